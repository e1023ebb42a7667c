"""Score a run on held-out clips and measure the scores: `prospect-dst evaluate RUN DATA`.

    OUT/teacher-forced.parquet    val and the split asked for, the reference's texts in the context
    OUT/free-running.parquet      that split once more, free-running
    OUT/metrics.json              every metric of both (trainer.evaluation.metrics), thresholds, settings, hashes

Thresholds are chosen on `val`, teacher-forced, and nowhere else. `evaluation.metrics.evaluate_scores` gives the same
digits from the Parquet files and the shards, without the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from pipeline.dataset import Split
from pipeline.errors import InputError
from pipeline.schema import HEADS
from trainer.checkpoint import LoadedRun, load_run, run_hash
from trainer.config import Settings, check_thresholds
from trainer.distributed import best_device
from trainer.evaluation.chunk_metrics import match_clips, read_sessions
from trainer.evaluation.metrics import METRICS_FILE, Evaluation, FreeRunning, Thresholds, hold, write_evaluation
from trainer.evaluation.scores import ScoredClip
from trainer.frame_source import FrameSource
from trainer.live.rollout import free_running
from trainer.live.session import DecodingConfig
from trainer.sequence import texts_at
from trainer.teacher_forced import open_source, score_clips


def evaluate(
    run: Path,
    data: Path,
    split: str = "test",
    out: Path | None = None,
    frames_root: Path | None = None,
    features: Path | None = None,
    settings: Settings | None = None,
    live: bool = True,
    chunks: Path | None = None,
    submission: Path | None = None,
    draws: int = 0,
    updates: str = "own",
    given: Mapping[str, float] | None = None,
) -> Evaluation:
    """Score `split` of `data` with the checkpoint in `run` into the folder `out` (None: RUN/evaluation-SPLIT).

    features: what `encode` wrote with this run's vision tower, instead of frames. live: also free-running. chunks,
    submission, draws: as for `all_metrics`. updates: whose state updates a free-running model has in its context and
    prompt, its "own" or the "reference"'s (the rung true-state): it still speaks by itself, and its DST head's scores
    are written, but all metrics of the state are the reference's; InputError for an arm whose updates have no content.
    given: thresholds (logits by head), which count instead of that head's chosen on val.
    """
    check_thresholds(given or {})
    settings = settings or Settings()
    loaded, held = load_run(run), hold(data, split)
    arm = loaded.model.arm
    if updates != "own" and (updates != "reference" or arm.dst_text != "content"):
        raise InputError(f"updates {updates!r}: expected own, or, for an arm that reads updates, reference")
    if chunks is not None:  # what does not fit is refused before anything is scored
        match_clips(read_sessions(chunks), list(held.test.in_order()))
    loaded.model.to(best_device())
    frames = open_source(list(held.all.values()), loaded.model, frames_root, features)
    folder = out or run / f"evaluation-{split}{'' if updates == 'own' else '-true-state'}"
    (folder / METRICS_FILE).unlink(missing_ok=True)  # the last to be written: with it the folder is complete
    origin: dict[str, Any] = {
        "data": str(data.resolve()),
        "data_key": {name: s.key for name, s in held.all.items()},
        "model": run_hash(run),
        "arm": loaded.config.arm,
        "updates": updates,
    }
    heads = HEADS if arm.dst_head else HEADS[:1]
    scored = {
        name: [
            _with_probabilities(loaded, ScoredClip(one.clip, dict(zip(heads, one.logits, strict=False)), {}))
            for one in score_clips(loaded, part.in_order(), frames)
        ]
        for name, part in held.all.items()
    }

    live_pass = partial(_run_live, loaded, held.test, frames, settings, updates) if live else None
    return write_evaluation(folder, scored, held, settings, origin, live_pass, chunks, submission, draws, given)


def _run_live(
    run: LoadedRun, split: Split, frames: FrameSource, settings: Settings, updates: str, thresholds: Thresholds
) -> FreeRunning:
    """All clips of the split, free-running. Which clips share a pass moves last digits, so they go by clip_id."""
    clips = sorted(split.in_order(), key=lambda clip: clip.clip_id)
    given = {
        (clip.clip_id, frame): {"DST_UPDATE": ", ".join(texts)}
        for clip in (clips if updates == "reference" else ())
        for frame, texts in texts_at(clip, "DST_UPDATE").items()
    }
    own = {head: at for head, at in thresholds.event.items() if updates == "own" or head != "dst_update"}
    decoding = DecodingConfig(own, settings.refractory_s)
    passes = free_running(
        run.model, run.tokens, clips, frames, run.config, decoding,
        script=lambda clip, frame: given.get((clip.clip_id, frame), {}),
    )  # fmt: skip
    scored = [_with_probabilities(run, one) for one in passes]
    return FreeRunning(sorted(scored, key=lambda one: one.clip.clip))


def _with_probabilities(run: LoadedRun, scored: ScoredClip) -> ScoredClip:
    """float32 [F] by head: of the logits after the correction for sampling; none where that is not known."""
    if (correction := run.logit_correction) is None:
        return scored
    corrected = {head: values.astype(np.float64) + correction for head, values in scored.logits.items()}
    return replace(scored, probabilities={head: expit(v).astype(np.float32) for head, v in corrected.items()})

"""Scores a run on held-out clips, or takes anybody's scores, and says what they are worth: `prospect-dst evaluate`.

    OUT/teacher-forced.parquet    val and the split asked for, the reference's texts in the context
    OUT/self-fed.parquet          that split once more, frame by frame, the model's own texts in the context
    OUT/metrics.json              every metric of both (trainer.evaluation.measure), thresholds, settings, hashes

Thresholds are chosen on `val`, teacher-forced, and nowhere else; the self-fed pass runs with them. All metrics follow
from the two Parquet files and the shards: `evaluate_scores` gives the same digits without the model. What it trades:
self-fed costs a forward pass per frame and per written token, one clip at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.checkpoint import LoadedRun, load_run, run_hash
from trainer.clips import DST, SPEAK
from trainer.errors import TrainerError
from trainer.evaluation.measure import Settings, Thresholds, choose_thresholds, measure
from trainer.evaluation.scores import ScoredClip, read_info, read_scores, write_scores
from trainer.frames import FrameSource
from trainer.score import ClipScores, open_source, score_clips
from trainer.selffed import Live, self_fed
from trainer.shards import Split

TEACHER_FORCED, SELF_FED = MODES = ("teacher-forced", "self-fed")
METRICS_FILE = "metrics.json"


@dataclass(frozen=True)
class Evaluation:
    """What one model is worth: `metrics` is the content of metrics.json, `notes` what it lacks and why."""

    split: str
    metrics: dict[str, Any]
    notes: tuple[str, ...]
    folder: Path | None = None  # where the files are


@dataclass(frozen=True)
class Held:
    """The split to measure on, and the one to choose thresholds on, if there is one."""

    test: Split
    val: Split | None

    @property
    def all(self) -> dict[str, Split]:
        return {split.name: split for split in (self.val, self.test) if split is not None}


def evaluate(
    run: Path,
    data: Path,
    split: str = "test",
    out: Path | None = None,
    frames_root: Path | None = None,
    features: Path | None = None,
    settings: Settings | None = None,
    live: bool = True,
    encoder: Path | None = None,
) -> Evaluation:
    """Score `split` of `data` with the checkpoint in `run` into the folder `out` (None: RUN/evaluation-SPLIT).

    features: what `encode` wrote with this run's vision tower, instead of frames. live: also self-fed. encoder: a
    local sentence-transformers folder, to match what was said by meaning, in ProAssist's own window.
    """
    settings = settings or Settings()
    loaded, held = load_run(run), hold(data, split)
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    frames = open_source(list(held.all.values()), loaded.model, frames_root, features)
    folder = out or run / f"evaluation-{split}"
    about = {
        "data": str(data.resolve()),
        "data_key": {s.name: s.key for s in held.all.values()},
        "model": run_hash(run),
    }
    scored = {name: teacher_forced(loaded, s, frames) for name, s in held.all.items()}
    thresholds, notes = _thresholds(scored, held, settings)
    about |= {"thresholds": asdict(thresholds)}
    write_scores(folder / f"{TEACHER_FORCED}.parquet", scored, about | {"mode": TEACHER_FORCED})
    of_modes = {TEACHER_FORCED: scored[split]}
    if live and missing(loaded, thresholds):
        notes.append(f"not self-fed: no threshold for {', '.join(missing(loaded, thresholds))}")
    elif live:
        of_modes[SELF_FED] = run_live(loaded, held.test, frames, thresholds, settings)
        write_scores(folder / f"{SELF_FED}.parquet", {split: of_modes[SELF_FED]}, about | {"mode": SELF_FED})
    metrics = _metrics(of_modes, thresholds, settings, encoder) | about | {"split": split, "arm": loaded.config.arm}
    _write(folder / METRICS_FILE, metrics)
    return Evaluation(split, metrics, tuple(notes), folder)


def evaluate_scores(
    path: Path,
    data: Path | None = None,
    split: str = "test",
    out: Path | None = None,
    settings: Settings | None = None,
    given: Mapping[str, float] | None = None,
    encoder: Path | None = None,
) -> Evaluation:
    """Measure a scores Parquet, ours or anybody's, against the shards in `data` (None: where the file says they are).

    Thresholds are `given` (logits by head), chosen on the file's own `val` rows, or, of a live file, those that it says
    it ran with; else what needs one is None. `out`: a folder for metrics.json; without, nothing is written.
    """
    settings, info = settings or Settings(), read_info(path)
    held = hold(_shards(path, data, info), split)
    mode = str(info.get("mode", "scores"))
    names = [name for name in held.all if name == split or _has_split(path, name)]
    scored = read_scores(path, {name: held.all[name] for name in names})
    notes: list[str] = []
    if given:
        thresholds = Thresholds(dict(given), dict(given))
    elif "thresholds" in info and scored[split][0].said is not None:  # those that it ran with
        thresholds = Thresholds(**info["thresholds"])
    else:
        thresholds, notes = _thresholds(scored, held, settings)
    metrics = _metrics({mode: scored[split]}, thresholds, settings, encoder)
    metrics |= {"file": str(path), "split": split, "thresholds": asdict(thresholds)}
    if out is not None:
        _write(out / METRICS_FILE, metrics)
    return Evaluation(split, metrics, tuple(notes), out)


# ---- the parts, which `benchmark` takes as well --------------------------------------------------------------


def hold(data: Path, split: str, val: str = "val") -> Held:
    """The split and `val`, which is where thresholds come from: never from the split itself."""
    test = Split(data, split)
    return Held(test, Split(data, val) if val in test.manifest["splits"] and split != val else None)


def teacher_forced(run: LoadedRun, split: Split, frames: FrameSource) -> list[ScoredClip]:
    """All clips of the split, scored with the reference's texts in the context."""
    scored = score_clips(run.model, run.tokens, split.in_order(), frames, run.config)
    return [_as_scored(clip, run) for clip in scored]


def run_live(
    run: LoadedRun, split: Split, frames: FrameSource, thresholds: Thresholds, settings: Settings
) -> list[ScoredClip]:
    """All clips of the split, frame by frame, the model's own texts in the context."""
    live = Live(thresholds.event, settings.refractory_s)
    scored = self_fed(run.model, run.tokens, split.in_order(), frames, run.config, live)
    return [
        ScoredClip(s.clip, s.logits, _probabilities(s.logits, run.logit_correction), s.said, s.updates) for s in scored
    ]


def missing(run: LoadedRun, thresholds: Thresholds) -> list[str]:
    """Heads of the run's arm that have no threshold, so that it can't run live."""
    heads = ("speaking", "dst_update") if run.model.arm.dst_head else ("speaking",)
    return [head for head in heads if head not in thresholds.event]


def _as_scored(clip: ClipScores, run: LoadedRun) -> ScoredClip:
    logits = {"speaking": clip.logits[SPEAK]}
    if run.model.arm.dst_head:
        logits["dst_update"] = clip.logits[DST]
    return ScoredClip(clip.clip, logits, _probabilities(logits, run.logit_correction))


def _probabilities(logits: Mapping[str, Any], correction: float | None) -> dict[str, Any]:
    """float32 [F] by head: of the logits after the correction for sampling; none where that is not known."""
    if correction is None:
        return {}
    with np.errstate(over="ignore"):
        return {
            head: (1 / (1 + np.exp(-(values.astype(np.float64) + correction)))).astype(np.float32)
            for head, values in logits.items()
        }


def _thresholds(
    scored: Mapping[str, Sequence[ScoredClip]], held: Held, settings: Settings
) -> tuple[Thresholds, list[str]]:
    """Chosen on val; without any, the reason."""
    if held.val is None:
        return Thresholds({}, {}), ["no val split beside it: no threshold was chosen, so no events from scores"]
    if held.val.name not in scored:
        return Thresholds({}, {}), [f"no scores of {held.val.name}: no threshold was chosen; score it, or give one"]
    return choose_thresholds(scored[held.val.name], settings), []


def _metrics(
    of_modes: Mapping[str, Sequence[ScoredClip]], thresholds: Thresholds, settings: Settings, encoder: Path | None
) -> dict[str, Any]:
    found: dict[str, Any] = {mode: measure(clips, thresholds, settings) for mode, clips in of_modes.items()}
    if encoder is not None:
        from trainer.evaluation.text import EARLY_S, LATE_S, dialogue_metrics, load_encoder

        by_meaning = load_encoder(encoder)
        for mode, clips in of_modes.items():
            if all(clip.said is not None for clip in clips):
                found[mode]["dialogue"] = dialogue_metrics(clips, by_meaning, EARLY_S, LATE_S)
    return {"settings": asdict(settings)} | found


def _shards(path: Path, data: Path | None, info: Mapping[str, Any]) -> Path:
    if data is not None:
        return data
    if "data" not in info:
        raise TrainerError(f"{path}: does not say which shards it is of; name them: evaluate DATA --scores {path}")
    return Path(info["data"])


def _has_split(path: Path, name: str) -> bool:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if "split" not in pq.read_schema(path).names:
        return False
    splits = pq.read_table(path, columns=["split"])["split"]
    return bool(pc.any(pc.equal(splits.cast("string"), name)).as_py())


def _write(path: Path, metrics: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    new.rename(path)

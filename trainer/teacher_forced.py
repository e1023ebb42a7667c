"""Teacher-forced scores: both heads' logits at every frame of a split, and their average precision.

The context holds the reference's texts, which flatters (a DST text, whatever it says, announces that speech is near):
`trainer.live.rollout` is free-running, `trainer.evaluate` reports both. Every frame is supervised. On a CPU each window
has a forward pass to itself, so no score depends on what else is scored; on a GPU windows are packed as in training,
which moves a logit by rounding (float32: under 1e-3).

    F frames of a clip    N frames of a pass    W windows of a pass
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.dataset import ClipExample, Split
from pipeline.errors import NotFiniteError
from pipeline.schema import HEADS
from trainer.arms import Arm
from trainer.checkpoint import LoadedRun
from trainer.distributed import World, best_device
from trainer.features import CachedFeatures, fingerprint, kept_layer
from trainer.frame_source import BlankFrames, FrameSource, PixelFrames, open_frames
from trainer.loader import Transfer, fetched
from trainer.loss import lm_sum
from trainer.model import ProspectModel
from trainer.packing import make_pack, windows_of
from trainer.sequence import Window


class ClipScores(NamedTuple):
    """One clip's frames, in order."""

    clip: ClipExample
    logits: npt.NDArray[np.float32]  # [2, F] speaking, DST_UPDATE
    lm_loss: float  # nats, summed over the clip's supervised text
    lm_tokens: int


class Run(LoadedRun):
    """What `trainer.load` returns: a trained model that scores clips."""

    def score(
        self, data: str | Path, split: str = "test", frames_root: Path | None = None, features: Path | None = None
    ) -> Iterator[ClipScores]:
        """Each clip of a split of `data`, in order, with logits float32 [2, F]; on the GPU if there is one.

        features: what `encode` wrote with this run's vision tower, instead of frames.
        """
        opened = Split(Path(data), split)
        model = self.model.to(best_device())
        frames = open_source([opened], model, frames_root, features)
        return score_clips(self, opened.in_order(), frames)


def open_source(
    splits: Sequence[Split], model: ProspectModel, frames_root: Path | None, features: Path | None
) -> FrameSource:
    """Cached features where there is a folder of them, else pixels below `frames_root` (None: as the manifest says);
    blank frames for an arm without images. Raises InputError where a clip of `splits` has none."""
    source: PixelFrames | CachedFeatures
    if not model.arm.images:
        return BlankFrames()
    if features is None:
        source = open_frames(splits[0].manifest, frames_root, model.side)
    else:
        source = CachedFeatures(features, fingerprint(model.vlm, kept_layer(features)), model.tokens_per_frame)
    for split in splits:
        for clip in split.in_order(rate=None):
            source.find(clip)
    return source


def score_split(
    run: LoadedRun, split: Split, frames: FrameSource, world: World, together: bool = False
) -> list[ClipScores]:
    """All clips of `split`, in order, on every rank; each rank scores its share, or all of them `together` (FSDP)."""
    rank, size = (0, 1) if together else (world.rank, world.size)
    scored = [one[1:] for one in score_clips(run, itertools.islice(split.in_order(), rank, None, size), frames)]
    by_rank = [scored] if size == 1 else world.gather(scored)
    return [ClipScores(clip, *by_rank[i % size][i // size]) for i, clip in enumerate(split.in_order())]


def score_clips(
    run: LoadedRun, clips: Iterator[ClipExample], frames: FrameSource, budget: int | None = None
) -> Iterator[ClipScores]:
    """Each clip's scores, in the order of `clips`.

    budget: tokens of a forward pass, 0 for one window alone; None: 0 on a CPU, `config.micro_batch_tokens` on a GPU.
    """
    model = run.model
    if budget is None:
        budget = run.config.micro_batch_tokens if model.device.type == "cuda" else 0
    training = model.training
    model.eval()
    pending: deque[tuple[ClipExample, int]] = deque()  # with the number of its windows

    def passes() -> Iterator[list[Window]]:  # in order, as many together as `budget` tokens hold, at least one
        group: list[Window] = []
        for clip in clips:
            windows = windows_of([clip], run.tokens, run.config)
            pending.append((clip, len(windows)))
            for window in windows:
                if group and sum(len(held.input_ids) for held in [*group, window]) > budget:
                    yield group
                    group = []
                group.append(window)
        if group:
            yield group

    transfer = Transfer(model.device)
    scored = itertools.chain.from_iterable(fetched(_start_pass(model, group, frames, transfer) for group in passes()))
    for first in scored:
        clip, count = pending.popleft()
        logits, losses, counts = zip(first, *itertools.islice(scored, count - 1), strict=True)
        yield ClipScores(clip, np.concatenate(logits, 1), sum(losses), sum(counts))
    model.train(training)


@torch.inference_mode()
def _start_pass(
    model: ProspectModel, windows: Sequence[Window], frames: FrameSource, transfer: Transfer
) -> Callable[[], list[tuple[npt.NDArray[np.float32], float, int]]]:
    """One forward pass over some windows; the function that it returns waits for their scores: each window's logits of
    its own frames, text loss, number of text tokens."""
    pack = transfer.pack(make_pack(windows, frames))()
    scores = model(pack)
    lm_tokens = [len(window.lm_positions) for window in windows]
    texts = zip(scores.text.split(lm_tokens), pack.lm_targets.split(lm_tokens), strict=True)
    decisions = transfer.down(scores.decisions[:2])  # [2, N]
    losses = transfer.down(torch.stack([lm_sum(text, targets) for text, targets in texts]))  # [W]

    def fetch() -> list[tuple[npt.NDArray[np.float32], float, int]]:
        logits = np.split(decisions().numpy(), np.cumsum([w.labels.shape[1] for w in windows])[:-1], axis=1)
        own = [of_window[:, window.context :] for of_window, window in zip(logits, windows, strict=True)]
        return list(zip(own, losses().tolist(), lm_tokens, strict=True))

    return fetch


def report(split: str, scored: Sequence[ClipScores], arm: Arm) -> dict[str, Any]:
    """The line `evaluation` of metrics.jsonl: over all frames of all clips, by head the average precision (None where
    there is no positive frame, or the arm has no such head) and that of guessing, the share of positive frames; the
    frames positive for one head alone and for both; nats per supervised text token. Raises NotFiniteError where a score
    is not finite."""
    from sklearn.metrics import average_precision_score  # scoring alone needs none of it

    logits = np.concatenate([s.logits for s in scored], 1)
    labels = np.concatenate([s.clip.labels for s in scored], 1)
    if not np.isfinite(logits).all():
        raise NotFiniteError("scores of held-out clips are not finite; train anew with a lower --lr")
    result: dict[str, Any] = {"split": split, "clips": len(scored)}
    for head, own, values in zip(HEADS, labels, logits, strict=True):
        known, positives = own >= 0, int((own == 1).sum())
        frames = int(known.sum())
        has_ap = positives and (head == "speaking" or arm.dst_head)
        ap = float(average_precision_score(own[known], values[known])) if has_ap else None
        result[head] = {"ap": ap, "chance": positives / max(frames, 1), "frames": frames, "positives": positives}
    speaks, updates = labels == 1
    cells = {"speaking_only": speaks & ~updates, "dst_update_only": updates & ~speaks, "both": speaks & updates}
    result |= {name: int(frames.sum()) for name, frames in cells.items()}
    text_tokens = sum(s.lm_tokens for s in scored)
    return result | {"lm_loss": sum(s.lm_loss for s in scored) / text_tokens if text_tokens else None}

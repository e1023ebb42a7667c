"""What a clip is to the trainer, and the pure rule that gives its labels in any epoch.

Parquet holds the labels of epoch 0. Of those only the positives are used; which silent frames count is drawn
anew for each epoch from (sampling_seed, epoch, frame), so a low rate still shows all silence over time.

    F frames of a clip
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.schema import NOT_SAMPLED, draws, rate_threshold

SPEAK, DST = 0, 1  # rows of every [2, ...] array: the two heads


@dataclass(frozen=True)
class Turn:
    """One entry of the conversation; [start_frame, end_frame) are absolute, both None where it has no frames."""

    role: str
    text: str
    start_frame: int | None = None
    end_frame: int | None = None
    time_s: float | None = None
    updates: tuple[tuple[str, str], ...] = ()  # (step id, transition)


@dataclass(frozen=True, eq=False)
class ClipExample:
    """One clip as the trainer sees it; `labels` int8 [2, F] (speaking, DST) are of the epoch asked for."""

    clip_id: str
    clip: int  # position in its split
    video_uid: str
    recording_id: str
    fps: float
    start_frame: int
    num_frames: int
    frames_file: str | None
    goal: str | None
    knowledge: str | None
    steps: tuple[tuple[str, str], ...]  # (id, name)
    initial_state: tuple[tuple[str, str], ...]  # (step id, state)
    turns: tuple[Turn, ...]
    sampling_seed: int
    neg_rate: float
    positive: str  # 'span' or 'onset'
    labels: npt.NDArray[np.int8]

    @property
    def end_frame(self) -> int:
        return self.start_frame + self.num_frames

    @property
    def tracks_state(self) -> bool:
        """Whether the clip says anything about the DST head."""
        return bool(self.steps) or any(turn.role == "DST_UPDATE" for turn in self.turns)


def epoch_labels(clip: ClipExample, positives: npt.NDArray[np.bool_], epoch: int, rate: float) -> npt.NDArray[np.int8]:
    """Labels int8 [2, F] of one epoch, from where each head is positive, bool [2, F]; reads no clip.labels.

    Epoch 0 at `clip.neg_rate` gives what Parquet holds; rate 1.0 supervises every frame, as evaluation does.
    """
    frames = np.arange(clip.start_frame, clip.end_frame)
    drawn = draws(clip.sampling_seed, epoch, frames).astype(np.uint64) < rate_threshold(rate)
    labels = np.where(positives[::-1] | drawn, 0, NOT_SAMPLED).astype(np.int8)
    if clip.positive == "onset":
        labels[_onset_rest(clip)] = NOT_SAMPLED
    labels[positives] = 1
    if not clip.tracks_state:
        labels[DST] = NOT_SAMPLED
    return labels


def _onset_rest(clip: ClipExample) -> npt.NDArray[np.bool_]:
    """bool [2, F]: the frames of each head's events after their first."""
    rest = np.zeros((2, clip.num_frames), bool)
    heads = {"assistant": SPEAK, "DST_UPDATE": DST}
    for turn in clip.turns:
        if turn.role in heads and turn.start_frame is not None and turn.end_frame is not None:
            first, end = turn.start_frame + 1 - clip.start_frame, turn.end_frame - clip.start_frame
            rest[heads[turn.role], max(first, 0) : max(end, 0)] = True
    return rest

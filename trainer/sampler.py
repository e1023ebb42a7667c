"""Which clips an optimizer step reads, and which of them are this rank's: pure functions of seed, step and rank.

Trades a perfectly global shuffle for bounded memory: row groups (of up to 256 clips) are permuted, and clips are
shuffled within a window of as many of them as the dataset holds. Clips are numbered without end, epoch after epoch, so
where a run is in its data is one integer, whatever the number of ranks and workers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.dataset import HELD_GROUPS, Split
from pipeline.schema import draws


def order(seed: int, epoch: int, sizes: Sequence[int], window: int = HELD_GROUPS) -> npt.NDArray[np.int64]:
    """int64 [N]: the epoch's N clips by their number on disk; `sizes`: clips of each row group."""
    # keys of the schema's hash, not a generator's stream: the order outlives numpy versions
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    groups = np.argsort(draws(seed, 2 * epoch, np.arange(len(sizes))), kind="stable")
    key = draws(seed, 2 * epoch + 1, np.arange(starts[-1]))
    out = []
    for i in range(0, len(groups), window):
        clips = np.concatenate([np.arange(starts[g], starts[g + 1]) for g in groups[i : i + window]])
        out.append(clips[np.argsort(key[clips], kind="stable")])
    return np.concatenate(out) if out else np.zeros(0, np.int64)


def share(frames: Sequence[int], rank: int, size: int) -> list[int]:
    """The clips of a step that are `rank`'s, as sorted indices into `frames`, their numbers of frames."""
    held, mine = [0] * size, []
    for i in sorted(range(len(frames)), key=lambda i: -frames[i]):  # the longest first
        owner = held.index(min(held))
        held[owner] += frames[i]
        if owner == rank:
            mine.append(i)
    return sorted(mine)


class Sampler:
    """The endless shuffled stream of a split's clips; clip `index` is at place `index % N` of epoch `index // N`."""

    def __init__(self, split: Split, seed: int) -> None:
        self.split, self.seed = split, seed
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def place(self, index: int) -> tuple[int, int]:
        """(number on disk, epoch) of clip `index` of the stream."""
        epoch, position = divmod(index, len(self.split))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, order(self.seed, epoch, self.split.sizes)
        return int(self._order[position]), epoch

    def places(self, step: int, clips_per_step: int, rank: int = 0, size: int = 1) -> list[tuple[int, int]]:
        """(number on disk, epoch) of the clips of an optimizer step that are `rank`'s, in order."""
        places = [self.place(i) for i in range(step * clips_per_step, (step + 1) * clips_per_step)]
        if size == 1:
            return places
        frames = [self.split.num_frames(number) for number, _ in places]
        return [places[i] for i in share(frames, rank, size)]

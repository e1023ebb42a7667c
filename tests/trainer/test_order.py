"""The order of clips: a pure function of (seed, epoch), the same for any ranks and workers, in bounded memory."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import Counter

import numpy as np
import pytest
from by_hand import clip_example, turn, write_shards
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline import dataset as shards
from pipeline.dataset import WINDOW_GROUPS, Split, order

TURNS = (turn("assistant", "yes", 2, 4),)
SEED, STEP = 9, 8  # clips of an optimizer step


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """50 clips in 13 row groups over 3 shards."""
    clips = [clip_example(TURNS, 0, 6 + i % 3, clip_id=f"c{i}", clip=i) for i in range(50)]
    return write_shards(tmp_path_factory.mktemp("data"), {"train": clips}, group=4, part=20)


@pytest.fixture
def split(data):
    return Split(data, "train")


@pytest.fixture
def read(monkeypatch):
    """The numbers on disk of the first clip of each row group, as they are read."""
    numbers, group = [], shards._Group

    def counting(where, first_clip):
        numbers.append(first_clip)
        return group(where, first_clip)

    monkeypatch.setattr(shards, "_Group", counting)
    return numbers


def clips_of(split, indices):
    return [(split.labels_at(SEED, i).clip, split.labels_at(SEED, i).labels.tolist()) for i in indices]


# ---- a pure function ---------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 20), max_size=12), st.integers(0, 2**40), st.integers(0, 5))
def test_order_is_a_permutation_and_pure(sizes, seed, epoch):
    found = order(seed, epoch, sizes)
    assert sorted(found.tolist()) == list(range(sum(sizes)))
    assert np.array_equal(found, order(seed, epoch, sizes))


def test_order_holds_few_groups_at_a_time_and_changes_with_epoch_and_seed():
    sizes = [10] * 20
    first = order(3, 0, sizes, window=4)
    for i in range(0, 200, 40):
        assert len(set(first[i : i + 40] // 10)) == 4
    assert not np.array_equal(first, order(3, 1, sizes, window=4))
    assert not np.array_equal(first, order(4, 0, sizes, window=4))
    assert Counter(first.tolist()) == Counter(range(200))


def test_order_is_pinned(split):
    assert order(0, 0, [3, 2, 3], window=2).tolist() == [1, 7, 0, 6, 5, 2, 3, 4]
    assert [split.labels_at(SEED, i).clip for i in (0, 1, 2, 49, 50, 51, 52)] == [13, 5, 11, 23, 3, 12, 1]


def test_every_epoch_visits_every_clip_once(split):
    for epoch in range(3):
        stream = range(50 * epoch, 50 * epoch + 50)
        assert sorted(split.labels_at(SEED, i).clip for i in stream) == list(range(50))


def test_the_stream_by_index_is_the_epochs_one_after_the_other(split):
    by_index = [split.at(SEED, i) for i in range(100)]
    by_epoch = [*split.epoch(SEED, 0), *split.epoch(SEED, 1)]
    assert [c.clip_id for c in by_index] == [c.clip_id for c in by_epoch]
    assert all(np.array_equal(a.labels, b.labels) for a, b in zip(by_index, by_epoch, strict=True))


def test_a_clip_is_the_same_from_whatever_side_it_is_reached(data, split):
    forwards = clips_of(split, range(75))
    fresh = Split(data, "train")
    jumps = np.random.default_rng(0).permutation(75).tolist()
    assert clips_of(fresh, jumps) == [forwards[i] for i in jumps]


def test_an_epoch_goes_on_from_any_position(split):
    whole = [c.clip_id for c in split.epoch(5, 2)]
    assert [c.clip_id for c in split.epoch(5, 2, position=37)] == whole[37:]


# ---- ranks and workers -------------------------------------------------------------------------------


def own_steps(split, rank, ranks, worker, workers, steps):
    """{step: [(index, clip)]} of one worker of one rank: of every step that is its turn, the rank's share."""
    return {
        step: [(i, split.at(SEED, i)) for i in range(step * STEP, (step + 1) * STEP)[rank::ranks]]
        for step in range(worker, steps, workers)
    }


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("workers", [0, 1, 2, 3, 4])
def test_ranks_and_workers_together_see_the_one_stream(data, split, ranks, workers):
    steps = 14  # 112 clips: past two epochs
    alone = [(c.clip_id, c.labels.tolist()) for c in (split.at(SEED, i) for i in range(steps * STEP))]
    together = {}
    for rank in range(ranks):
        for worker in range(max(workers, 1)):
            own = own_steps(Split(data, "train"), rank, ranks, worker, max(workers, 1), steps)
            together |= {i: (c.clip_id, c.labels.tolist()) for step in own.values() for i, c in step}
    assert [together[i] for i in range(steps * STEP)] == alone


class Steps(IterableDataset):
    """What a DataLoader's worker runs: the steps that are its turn."""

    def __init__(self, split, steps):
        self.split, self.steps = split, steps

    def __iter__(self):
        info = get_worker_info()
        for step in range(info.id, self.steps, info.num_workers):
            yield [self.split.at(SEED, i) for i in range(step * STEP, (step + 1) * STEP)]


def test_spawned_dataloader_workers_see_the_one_stream(split):
    loader = DataLoader(Steps(split, 9), batch_size=None, num_workers=2, multiprocessing_context="spawn")
    found = [clip for step in loader for clip in step]
    alone = [split.at(SEED, i) for i in range(9 * STEP)]
    assert [c.clip_id for c in found] == [c.clip_id for c in alone]
    assert all(np.array_equal(a.labels, b.labels) and a.turns == b.turns for a, b in zip(found, alone, strict=True))


# ---- what is read and held ---------------------------------------------------------------------------


def test_the_middle_of_an_epoch_is_reached_without_reading_what_was_skipped(split, read):
    wanted = order(SEED, 1, split.sizes)[45:].tolist()
    assert [split.at(SEED, 50 + i).clip for i in range(45, 50)] == wanted
    assert sorted(read) == sorted({n // 4 * 4 for n in wanted})


@pytest.mark.parametrize("stride", [1, 3])
def test_rising_indices_read_a_row_group_at_most_once_an_epoch(split, read, stride):
    for i in range(0, 150, stride):
        split.at(SEED, i)
    times = Counter(read)
    assert sorted(times) == list(range(0, 50, 4))
    assert max(times.values()) <= 3


def test_no_more_than_a_window_of_row_groups_is_held(split, monkeypatch):
    held, most, group = weakref.WeakSet(), [], shards._Group

    def watched(where, first_clip):
        loaded = group(where, first_clip)
        held.add(loaded)
        return loaded

    monkeypatch.setattr(shards, "_Group", watched)
    for clip in itertools.chain(split.epoch(SEED, 0), split.in_order()):
        assert clip.turns[0].text == "yes"  # texts and turns are in memory, too
        most.append(len(held))
    split.statistics()
    gc.collect()
    assert max(most) == len(held) == WINDOW_GROUPS

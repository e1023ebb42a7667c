"""The order of clips: a pure function of (seed, epoch), the same for any ranks and workers, in bounded memory."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import numpy as np
import pytest
from by_hand import clip_example, turn, write_shards
from hypothesis import given
from hypothesis import strategies as st

from pipeline import dataset
from pipeline.dataset import HELD_GROUPS, Split
from trainer.sampler import Sampler, order, share

TURNS = (turn("assistant", "yes", 2, 4),)
SEED, STEP = 9, 8  # clips of an optimizer step


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """50 clips in 13 row groups over 3 shards."""
    clips = [clip_example(TURNS, 0, 6 + i % 3, clip_id=f"c{i}", clip=i) for i in range(50)]
    return write_shards(tmp_path_factory.mktemp("data"), {"train": clips}, group=4, part=20)


@pytest.fixture
def sampler(data):
    return Sampler(Split(data, "train"), SEED)


@pytest.fixture
def read(monkeypatch):
    """(shard, row group), as they are read."""
    reads = []
    read = lru_cache(HELD_GROUPS)(lambda *where: reads.append(where) or dataset._RowGroup(*where))
    monkeypatch.setattr(dataset, "_row_group", read)
    return reads


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


def test_order_is_pinned(sampler):
    assert order(0, 0, [3, 2, 3], window=2).tolist() == [1, 7, 0, 6, 5, 2, 3, 4]
    assert [sampler.place(i)[0] for i in (0, 1, 2, 49, 50, 51, 52)] == [13, 5, 11, 23, 3, 12, 1]


def test_a_clip_is_the_same_from_whatever_side_it_is_reached(data, sampler):
    forwards = [sampler.place(i) for i in range(125)]
    assert [epoch for _, epoch in forwards] == [0] * 50 + [1] * 50 + [2] * 25
    jumps = np.random.default_rng(0).permutation(125).tolist()
    fresh = Sampler(Split(data, "train"), SEED)
    assert [fresh.place(i) for i in jumps] == [forwards[i] for i in jumps]


def test_clips_are_shared_by_their_frames():
    frames = [5, 9, 4, 4, 2]
    assert share(frames, 0, 1) == [0, 1, 2, 3, 4]
    assert [share(frames, rank, 2) for rank in (0, 1)] == [[1, 3], [0, 2, 4]]  # 9 + 4 and 5 + 4 + 2
    assert [share([3], rank, 3) for rank in range(3)] == [[0], [], []]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_together_read_the_one_stream(data, sampler, ranks):
    for step in range(14):  # 112 clips: past two epochs
        alone = [(c.clip_id, c.labels.tolist()) for c in sampler.step(step, STEP)]
        parts = [Sampler(Split(data, "train"), SEED).step(step, STEP, rank, ranks) for rank in range(ranks)]
        assert sorted((c.clip_id, c.labels.tolist()) for part in parts for c in part) == sorted(alone)


def test_the_middle_of_an_epoch_is_reached_without_reading_what_was_skipped(sampler, read):
    wanted = order(SEED, 1, sampler.split.sizes)[45:].tolist()
    assert [sampler.split.clip(*sampler.place(50 + i)).clip for i in range(45, 50)] == wanted
    assert len(read) == len({n // 4 for n in wanted})


@pytest.mark.parametrize("stride", [1, 3])
def test_rising_indices_read_a_row_group_at_most_once_an_epoch(sampler, read, stride):
    for i in range(0, 150, stride):
        sampler.split.clip(*sampler.place(i))
    times = Counter(read)
    assert len(times) == 13
    assert max(times.values()) <= 3

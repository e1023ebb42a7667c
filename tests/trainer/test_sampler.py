"""The order of clips: a pure function of (seed, epoch), the same for any ranks and workers, in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
from by_hand import clip_example, turn, write_shards

from pipeline.dataset import Split
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


def test_order_is_a_permutation_that_holds_few_groups_at_a_time_and_changes_with_epoch_and_seed():
    sizes = [10] * 20
    first = order(3, 0, sizes, window=4)
    assert sorted(first.tolist()) == list(range(200))
    assert np.array_equal(first, order(3, 0, sizes, window=4))
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


@pytest.mark.parametrize("ranks", [2, 8])
def test_ranks_together_read_the_one_stream(data, sampler, ranks):
    for step in (0, 6, 13):  # of 8 clips: the last is past two epochs
        parts = [Sampler(Split(data, "train"), SEED).places(step, STEP, rank, ranks) for rank in range(ranks)]
        assert sorted(place for part in parts for place in part) == sorted(sampler.places(step, STEP))

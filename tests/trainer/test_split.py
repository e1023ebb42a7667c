"""Reading shards: labels redrawn per epoch, order, verification."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from by_hand import clip_example, dst, labels_by_hand, positives, turn, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.schema import draws
from trainer.clips import epoch_labels
from trainer.errors import TrainerError
from trainer.shards import Split, order

TURNS = (turn("user", "hi", 12, 13), turn("assistant", "yes", 13, 16), dst(14, 17, ("S1", "start")))


def clips(n, **more):
    return [clip_example(TURNS, 10, 12 + i % 5, clip_id=f"c{i}", clip=i, video=f"v{i}", **more) for i in range(n)]


def same(a, b) -> bool:
    values = zip(a.__dict__.items(), b.__dict__.values(), strict=True)
    return all(np.array_equal(x, y) if name == "labels" else x == y for (name, x), y in values)


def test_reads_back_what_was_written(tmp_path):
    written = clips(7)
    split = Split(write_shards(tmp_path, {"train": written}, group=3, part=5), "train")
    assert len(split) == 7
    assert split.sizes == [3, 2, 2]
    assert all(same(a, b) for a, b in zip(split.in_order(rate=None), written, strict=True))


def test_epoch_zero_is_what_is_stored_and_later_epochs_are_redrawn(tmp_path):
    written = {c.clip_id: c for c in clips(6)}
    split = Split(write_shards(tmp_path, {"train": list(written.values())}), "train")
    for clip in split.epoch(seed=1, epoch=0):
        assert np.array_equal(clip.labels, written[clip.clip_id].labels)
    later = {c.clip_id: c.labels for c in split.epoch(seed=1, epoch=1)}
    assert any(not np.array_equal(later[i], c.labels) for i, c in written.items())
    for i, clip in written.items():
        assert np.array_equal(later[i] == 1, clip.labels == 1)


def test_labels_written_out_by_hand():
    clip = clip_example(TURNS, 10, 8, rate=0.5)
    drawn = draws(clip.sampling_seed, 0, np.arange(10, 18)) < 2**31
    assert drawn.tolist() == [True, *[False] * 6, True]
    assert clip.labels.tolist() == [[0, -100, -100, 1, 1, 1, 0, 0], [0, -100, -100, 0, 1, 1, 1, 0]]
    onset = clip_example(TURNS, 10, 8, rate=0.5, positive="onset")
    # frame 14: the rest of the assistant's event (-100) although DST is positive there
    assert onset.labels.tolist() == [[0, -100, -100, 1, -100, -100, -100, 0], [0, -100, -100, 0, 1, -100, -100, 0]]


def test_a_clip_without_steps_or_updates_says_nothing_about_dst():
    clip = clip_example([turn("assistant", "yes", 2, 3)], 0, 4, steps=(), rate=1.0)
    found = epoch_labels(clip, clip.labels == 1, 3, 1.0)
    assert found.tolist() == [[0, 0, 1, 0], [-100] * 4]


EVENTS = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "DST_UPDATE"]), st.integers(0, 45), st.integers(0, 9)),
    max_size=6,
)


@settings(deadline=None)
@given(EVENTS, st.sampled_from(["span", "onset"]), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 3), st.booleans())
def test_labels_equal_the_frame_by_frame_rules(events, positive, rate, epoch, steps):
    turns = [turn(role, "x", start, start + n) for role, start, n in events]
    more = {} if steps else {"steps": ()}
    clip = clip_example(turns, 10, 30, positive=positive, rate=rate, **more)
    where = positives(turns, 10, 30, positive)
    assert np.array_equal(epoch_labels(clip, where, epoch, rate), labels_by_hand(clip, where, epoch, rate))


def test_rate_one_supervises_every_frame(tmp_path):
    split = Split(write_shards(tmp_path, {"val": clips(3, rate=0.1)}), "val")
    for clip in split.in_order():
        assert (clip.labels >= 0).all()
        assert np.array_equal(clip.labels == 1, positives(TURNS, 10, clip.num_frames, "span"))


def test_statistics_count_labels(tmp_path):
    written = clips(7)
    split = Split(write_shards(tmp_path, {"train": written}, group=2), "train")
    labels = np.concatenate([c.labels for c in written], 1)
    statistics = split.statistics()
    assert statistics.counts.tolist() == [[int((row == v).sum()) for v in (0, 1, -100)] for row in labels]
    assert statistics.neg_rate == 0.5
    speak = (labels[0] == 1).sum() / (labels[0] >= 0).sum()
    assert statistics.positive_rates()[0] == pytest.approx(speak)


# ---- order -------------------------------------------------------------------------------------------


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


def test_order_is_pinned():
    assert order(0, 0, [3, 2, 3], window=2).tolist() == [1, 7, 0, 6, 5, 2, 3, 4]


def test_an_epoch_goes_on_from_any_position(tmp_path):
    split = Split(write_shards(tmp_path, {"train": clips(11)}, group=2), "train")
    whole = [c.clip_id for c in split.epoch(5, 2)]
    assert [c.clip_id for c in split.epoch(5, 2, position=6)] == whole[6:]


# ---- what can be wrong -------------------------------------------------------------------------------


def test_a_missing_split_names_those_there_are(tmp_path):
    write_shards(tmp_path, {"val": clips(1), "test": clips(1)})
    with pytest.raises(TrainerError, match=r"no split 'train', found: test, val; .*train_.*--split train"):
        Split(tmp_path, "train")


def test_a_folder_without_manifest_says_what_to_run(tmp_path):
    with pytest.raises(TrainerError, match=r"manifest\.json: not found, .*run prospect-dst preprocess"):
        Split(tmp_path, "train")


def test_another_schema_is_refused(tmp_path):
    path = write_shards(tmp_path, {"train": clips(1)}) / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "schema_hash": "0" * 16}))
    with pytest.raises(TrainerError, match=r"schema 1 0000000000000000, expected schema 1 .*run preprocess again"):
        Split(tmp_path, "train")
    path.write_text("[1, 2")
    with pytest.raises(TrainerError, match="not a manifest"):
        Split(tmp_path, "train")


@pytest.mark.parametrize("table", ["frames", "clips"])
def test_a_damaged_shard_is_named(tmp_path, table):
    write_shards(tmp_path, {"train": clips(2)})
    path = tmp_path / table / "split=train" / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(TrainerError, match=f"{table}/split=train/part-00000.parquet: damaged.*run preprocess again"):
        Split(tmp_path, "train")
    path.write_bytes(content[:-1])
    with pytest.raises(TrainerError, match=rf"{len(content) - 1} bytes, expected {len(content)} bytes"):
        Split(tmp_path, "train")
    path.unlink()
    with pytest.raises(TrainerError, match=r"part-00000\.parquet: missing"):
        Split(tmp_path, "train")


def test_labels_that_the_draw_does_not_give_are_refused(tmp_path):
    clip = clips(1)[0]
    labels = clip.labels.copy()
    labels[0, 7] = 0 if labels[0, 7] == -100 else -100
    split = Split(write_shards(tmp_path, {"train": [type(clip)(**{**clip.__dict__, "labels": labels})]}), "train")
    with pytest.raises(TrainerError, match=r"clip c0 frame 17: speaking_label is .* run preprocess again"):
        next(split.epoch(0, 1))

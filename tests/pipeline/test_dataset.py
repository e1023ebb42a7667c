"""Reading shards: what is read, labels redrawn per epoch, verification."""

from __future__ import annotations

import gc
import json
import tempfile
import weakref
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from by_hand import clip_example, dst, labels_by_hand, positives, turn, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import dataset
from pipeline.dataset import HELD_GROUPS, Split
from pipeline.errors import InputError
from pipeline.schema import draws

TURNS = (turn("user", "hi", 12, 13), turn("assistant", "yes", 13, 16), dst(14, 17, ("S1", "start")))


def clips(n, **more):
    return [clip_example(TURNS, 10, 12 + i % 5, clip_id=f"c{i}", clip=i, video=f"v{i}", **more) for i in range(n)]


def same(a, b) -> bool:
    values = zip(a.__dict__.items(), b.__dict__.values(), strict=True)
    return all(np.array_equal(x, y) if name == "labels" else x == y for (name, x), y in values)


def test_reads_back_what_was_written(tmp_path):
    written = clips(7)
    split = Split(write_shards(tmp_path, {"train": written}, group=3, part=5), "train")
    assert split.sizes == [3, 2, 2]
    assert all(same(a, b) for a, b in zip(split.in_order(rate=None), written, strict=True))
    assert [split.num_frames(i) for i in range(7)] == [12, 13, 14, 15, 16, 12, 13]


def test_epoch_zero_is_what_is_stored_and_later_epochs_are_redrawn(tmp_path):
    written = clips(6)
    split = Split(write_shards(tmp_path, {"train": written}), "train")
    assert all(np.array_equal(split.clip(c.clip, epoch=0).labels, c.labels) for c in written)
    later = [split.clip(c.clip, epoch=1).labels for c in written]
    assert any(not np.array_equal(a, c.labels) for a, c in zip(later, written, strict=True))
    assert all(np.array_equal(a == 1, c.labels == 1) for a, c in zip(later, written, strict=True))


def test_labels_written_out_by_hand():
    clip = clip_example(TURNS, 10, 8, rate=0.5)
    drawn = draws(clip.sampling_seed, 0, np.arange(10, 18)) < 2**31
    assert drawn.tolist() == [True, *[False] * 6, True]
    assert clip.labels.tolist() == [[0, -100, -100, 1, 1, 1, 0, 0], [0, -100, -100, 0, 1, 1, 1, 0]]
    onset = clip_example(TURNS, 10, 8, rate=0.5, positive="onset")
    # frame 14: the rest of the assistant's event (-100) although DST is positive there
    assert onset.labels.tolist() == [[0, -100, -100, 1, -100, -100, -100, 0], [0, -100, -100, 0, 1, -100, -100, 0]]


def test_a_clip_without_steps_or_updates_has_no_dst_labels(tmp_path):
    silent = clip_example([turn("assistant", "yes", 2, 3)], 0, 4, steps=(), rate=1.0, clip_id="a")
    update = clip_example([dst(2, 3)], 0, 4, steps=(), rate=1.0, clip_id="b", clip=1)
    stepped = clip_example([turn("assistant", "yes", 1, 2)], 0, 4, rate=1.0, clip_id="c", clip=2)
    split = Split(write_shards(tmp_path, {"train": [silent, update, stepped]}), "train")
    assert [split.clip(i, epoch=3).labels.tolist() for i in range(3)] == [
        [[0, 0, 1, 0], [-100] * 4],
        [[0, 0, 0, 0], [0, 0, 1, 0]],
        [[0, 1, 0, 0], [0, 0, 0, 0]],
    ]


EVENTS = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "DST_UPDATE"]), st.integers(0, 45), st.integers(0, 9)),
    max_size=6,
)
CLIPS = st.tuples(
    EVENTS,
    st.sampled_from(["span", "onset"]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.booleans(),
    st.integers(1, 30),
    st.sampled_from([(), ((0, 0.5),), ((0, 0.2), (0.7, 1)), ((0, 1),)]),  # shares of the clip that nobody annotated
)


@settings(deadline=None, max_examples=40)
@given(st.lists(CLIPS, min_size=1, max_size=5), st.integers(0, 3), st.sampled_from([None, 0.6, 1.0]))
def test_labels_of_a_row_group_equal_the_frame_by_frame_rules(drawn, epoch, rate):
    written = []
    for i, (events, positive, own_rate, steps, frames, shares) in enumerate(drawn):
        turns = [turn("system", "x"), *(turn(role, "x", start, start + n) for role, start, n in events)]
        more = {} if steps else {"steps": ()}
        edges = [(10 + int(a * frames), 10 + int(b * frames)) for a, b in shares]
        more |= {"positive": positive, "rate": own_rate, "clip_id": f"c{i}", "clip": i}
        more["unlabelled"] = [(a, b) for a, b in edges if a < b]
        written.append(clip_example(turns, 10, frames, **more))
    with tempfile.TemporaryDirectory() as folder:
        split = Split(write_shards(Path(folder), {"train": written}, group=3), "train")
        read = [split.clip(i, epoch, rate) for i in range(len(split))]
    for clip in read:
        where = positives(clip.turns, 10, clip.num_frames, clip.positive)
        expected = labels_by_hand(clip, where, epoch, clip.neg_rate if rate is None else rate)
        assert np.array_equal(clip.labels, expected)


def test_in_order_supervises_every_frame(tmp_path):
    split = Split(write_shards(tmp_path, {"val": clips(3, rate=0.1)}), "val")
    for clip in split.in_order():
        assert np.array_equal(clip.labels, positives(TURNS, 10, clip.num_frames, "span").astype(np.int8))


def test_statistics_count_the_stored_labels(tmp_path):
    written = clips(7)
    statistics = Split(write_shards(tmp_path, {"train": written}, group=2), "train").statistics()
    labels = np.concatenate([c.labels for c in written], 1)
    assert statistics.counts.tolist() == [[int((row == v).sum()) for v in (0, 1, -100)] for row in labels]
    assert statistics.neg_rate == 0.5
    assert statistics.positive_rates()[0] == pytest.approx((labels[0] == 1).sum() / (labels[0] >= 0).sum())


def test_few_row_groups_are_in_memory(tmp_path, monkeypatch):
    held, most = weakref.WeakSet(), []

    def watched(*where):
        held.add(loaded := dataset._RowGroup(*where))
        return loaded

    monkeypatch.setattr(dataset, "_row_group", lru_cache(HELD_GROUPS)(watched))
    split = Split(write_shards(tmp_path, {"train": clips(13)}, group=2), "train")
    for clip in split.in_order():
        assert clip.turns[1].text == "yes"
        most.append(len(held))
    split.statistics()
    gc.collect()
    assert max(most) == len(held) == HELD_GROUPS


# ---- what is refused ---------------------------------------------------------------------------------


def test_a_missing_split_names_those_there_are(tmp_path):
    write_shards(tmp_path, {"val": clips(1), "test": clips(1)})
    with pytest.raises(InputError, match=r"no split 'train', found: test, val; .*train_.*--split train"):
        Split(tmp_path, "train")


def test_a_folder_without_manifest_says_what_to_run(tmp_path):
    with pytest.raises(InputError, match=r"manifest\.json: not found, .*run prospect-dst preprocess"):
        Split(tmp_path, "train")


def test_another_schema_is_refused(tmp_path):
    path = write_shards(tmp_path, {"train": clips(1)}) / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "schema_hash": "0" * 16}))
    with pytest.raises(InputError, match=r"schema 2 0000000000000000, expected schema 2 .*run preprocess again"):
        Split(tmp_path, "train")
    path.write_text("[1, 2")
    with pytest.raises(InputError, match="not a manifest"):
        Split(tmp_path, "train")


@pytest.mark.parametrize("table", ["frames", "clips"])
def test_a_damaged_shard_is_named(tmp_path, table):
    write_shards(tmp_path, {"train": clips(2)})
    path = tmp_path / table / "split=train" / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{table}/split=train/part-00000.parquet: damaged.*run preprocess again"):
        Split(tmp_path, "train")
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=rf"{len(content) - 1} bytes, expected {len(content)} bytes"):
        Split(tmp_path, "train")
    path.unlink()
    with pytest.raises(InputError, match=r"part-00000\.parquet: missing"):
        Split(tmp_path, "train")

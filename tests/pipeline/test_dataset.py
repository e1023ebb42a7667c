"""Reading shards: what is read, labels redrawn per epoch, verification."""

from __future__ import annotations

import gc
import json
import weakref
from functools import lru_cache

import numpy as np
import pytest
from by_hand import clip_example, dst, positives, turn, write_shards

from pipeline import dataset
from pipeline.dataset import HELD_GROUPS, Split
from pipeline.errors import InputError

TURNS = (
    turn("system", "x"),
    turn("user", "hi", 12, 13),
    turn("assistant", "yes", 13, 16),
    dst(14, 17, ("S1", "start")),
)


def clips(n, **more):
    return [clip_example(TURNS, 10, 12 + i % 5, clip_id=f"c{i}", clip=i, video=f"v{i}", **more) for i in range(n)]


def same(a, b) -> bool:
    values = zip(a.__dict__.items(), b.__dict__.values(), strict=True)
    return all(np.array_equal(x, y) if name == "labels" else x == y for (name, x), y in values)


def test_reads_back_what_was_written_and_redraws_later_epochs(tmp_path):
    written = clips(7)
    split = Split(write_shards(tmp_path, {"train": written}, group=3, part=5), "train")
    assert split.sizes == [3, 2, 2]
    assert all(same(a, b) for a, b in zip(split.in_order(rate=None), written, strict=True))
    assert [split.num_frames(i) for i in range(7)] == [12, 13, 14, 15, 16, 12, 13]
    later = [split.clip(c.clip, epoch=1).labels for c in written]
    assert any(not np.array_equal(a, c.labels) for a, c in zip(later, written, strict=True))
    assert all(np.array_equal(a == 1, c.labels == 1) for a, c in zip(later, written, strict=True))
    for clip in split.in_order():  # every frame is supervised
        assert np.array_equal(clip.labels, positives(TURNS, 10, clip.num_frames, "span").astype(np.int8))


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
        assert clip.turns[2].text == "yes"
        most.append(len(held))
    split.statistics()
    gc.collect()
    assert max(most) == len(held) == HELD_GROUPS


# ---- what is refused ---------------------------------------------------------------------------------


def test_a_missing_split_or_manifest_says_what_there_is_and_what_to_run(tmp_path):
    with pytest.raises(InputError, match=r"manifest\.json: not found, .*run prospect-dst preprocess"):
        Split(tmp_path, "train")
    write_shards(tmp_path, {"val": clips(1), "test": clips(1)})
    with pytest.raises(InputError, match=r"no split 'train', found: test, val; .*train_.*--split train"):
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
    path.write_text(json.dumps(manifest))
    (tmp_path / "clips" / "split=train" / "part-00000.parquet").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"3 bytes, expected .*run preprocess again"):
        Split(tmp_path, "train")

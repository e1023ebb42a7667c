"""Reading shards: what is read, labels redrawn per epoch, verification."""

import json

import numpy as np
import pytest
from by_hand import clip_example, dst, positives, turn, write_shards

from pipeline.dataset import Split
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


def test_a_missing_split_another_schema_or_a_cut_shard_says_what_to_run(tmp_path):
    with pytest.raises(InputError, match=r"manifest\.json: not found, .*run prospect-dst preprocess"):
        Split(tmp_path, "train")
    path = write_shards(tmp_path, {"val": clips(1), "test": clips(1)}) / "manifest.json"
    with pytest.raises(InputError, match=r"no split 'train', found: test, val; .*train_.*--split train"):
        Split(tmp_path, "train")
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "schema_hash": "0" * 16}))
    with pytest.raises(InputError, match=r"schema 2 0000000000000000, expected schema 2 .*run preprocess again"):
        Split(tmp_path, "val")
    path.write_text(json.dumps(manifest))
    (tmp_path / "clips/split=val/part-00000.parquet").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"damaged, .*run preprocess again"):
        Split(tmp_path, "val")

"""Reading shards: what is read, labels redrawn per epoch, verification. The order is tested in test_order.py."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from by_hand import clip_example, dst, labels_by_hand, positives, turn, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import dataset as shards
from pipeline.dataset import Split
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


def test_a_clip_without_steps_or_updates_says_nothing_about_dst(tmp_path):
    silent = clip_example([turn("assistant", "yes", 2, 3)], 0, 4, steps=(), rate=1.0, clip_id="a")
    update = clip_example([dst(2, 3)], 0, 4, steps=(), rate=1.0, clip_id="b", clip=1)
    stepped = clip_example([turn("assistant", "yes", 1, 2)], 0, 4, rate=1.0, clip_id="c", clip=2)
    split = Split(write_shards(tmp_path, {"train": [silent, update, stepped]}), "train")
    found = {clip.clip_id: clip.labels.tolist() for clip in split.epoch(seed=0, epoch=3)}
    assert found == {
        "a": [[0, 0, 1, 0], [-100] * 4],
        "b": [[0, 0, 0, 0], [0, 0, 1, 0]],
        "c": [[0, 1, 0, 0], [0, 0, 0, 0]],
    }


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


@settings(deadline=None, max_examples=60)
@given(st.lists(CLIPS, min_size=1, max_size=5), st.integers(0, 3), st.sampled_from([None, 0.6, 1.0]))
def test_labels_of_a_group_equal_the_frame_by_frame_rules(drawn, epoch, rate):
    written = []
    for i, (events, positive, own_rate, steps, frames, shares) in enumerate(drawn):
        turns = [turn("system", "x"), *(turn(role, "x", start, start + n) for role, start, n in events)]
        more = {} if steps else {"steps": ()}
        more |= {"positive": positive, "rate": own_rate, "clip_id": f"c{i}", "clip": i}
        edges = [(10 + int(a * frames), 10 + int(b * frames)) for a, b in shares]
        more["unlabelled"] = [(a, b) for a, b in edges if a < b]
        written.append(clip_example(turns, 10, frames, **more))
    with tempfile.TemporaryDirectory() as folder:
        split = Split(write_shards(Path(folder), {"train": written}, group=3), "train")
        redrawn, in_order = list(split.epoch(7, epoch)), list(split.in_order(rate))
    for clip in redrawn:
        where = positives(clip.turns, 10, clip.num_frames, clip.positive)
        assert np.array_equal(clip.labels, labels_by_hand(clip, where, epoch, clip.neg_rate))
    for clip in in_order:
        where = positives(clip.turns, 10, clip.num_frames, clip.positive)
        assert np.array_equal(clip.labels, labels_by_hand(clip, where, 0, clip.neg_rate if rate is None else rate))


def test_labels_in_many_blocks_are_those_of_one_clip_at_a_time(tmp_path):
    written = clips(100, rate=0.3)
    split = Split(write_shards(tmp_path, {"train": written}), "train")
    for clip in split.epoch(seed=2, epoch=5):
        where = positives(TURNS, 10, clip.num_frames, "span")
        assert np.array_equal(clip.labels, labels_by_hand(clip, where, 5, 0.3))


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


# ---- as numbers, and lazily --------------------------------------------------------------------------


def test_turns_as_numbers_are_role_start_and_end(tmp_path):
    turns = [turn("system", "be kind"), *TURNS, turn("assistant", "later", 3, 4)]
    written = [clip_example(turns, 10, 8), clip_example([], 5, 3, clip_id="c1", clip=1)]
    split = Split(write_shards(tmp_path, {"train": written}), "train")
    found = {clip.clip: clip for clip in split.label_stream(seed=0, epoch=0)}
    expected = [[0, -1, -1], [1, 12, 13], [2, 13, 16], [3, 14, 17], [2, 3, 4]]  # roles in the schema's order
    assert found[0].turns.tolist() == expected
    assert found[0].turns.dtype == np.int32
    assert found[1].turns.shape == (0, 3)
    assert (found[0].start_frame, found[1].start_frame) == (10, 5)


def test_the_label_stream_is_the_epoch_without_texts(tmp_path):
    split = Split(write_shards(tmp_path, {"train": clips(11)}, group=2), "train")
    whole, numbers = list(split.epoch(5, 2, position=3)), list(split.label_stream(5, 2, position=3))
    assert len(numbers) == 8
    for clip, light in zip(whole, numbers, strict=True):
        assert (light.clip, light.start_frame) == (clip.clip, clip.start_frame)
        assert np.array_equal(light.labels, clip.labels)
        assert light.turns[:, 1].tolist() == [12, 13, 14]


def test_what_was_given_can_be_changed_without_harm(tmp_path):
    split = Split(write_shards(tmp_path, {"train": clips(2)}), "train")
    first, light = split.at(0, 0), split.labels_at(0, 0)
    before = first.labels.copy()
    first.labels[:] = 7
    light.labels[:] = 7
    light.turns[:] = 7
    assert np.array_equal(split.at(0, 0).labels, before)
    assert split.labels_at(0, 0).turns[0].tolist() == [1, 12, 13]


def test_turns_stay_in_arrow_until_one_is_looked_at(tmp_path, monkeypatch):
    split = Split(write_shards(tmp_path, {"train": clips(3)}), "train")
    decoded, decode = [], shards._decode
    monkeypatch.setattr(shards, "_decode", lambda structs: decoded.append(len(structs)) or decode(structs))
    chosen = list(split.in_order())
    assert decoded == []
    assert chosen[1].turns[1].text == "yes"
    assert [t.role for t in chosen[1].turns] == ["user", "assistant", "DST_UPDATE"]
    assert decoded == [3]


def test_lazy_turns_are_equal_to_and_pickled_as_the_tuple_of_them(tmp_path):
    split = Split(write_shards(tmp_path, {"train": clips(3)}), "train")
    one, other = (next(split.in_order()).turns for _ in range(2))
    assert one == other
    assert one == TURNS
    assert (TURNS == one) is True  # noqa: SIM300  the tuple's own comparison gives way to ours
    assert one != TURNS[:2]
    assert hash(one) == hash(TURNS)
    assert (len(one), one[-1], one[:1], list(one)) == (3, TURNS[2], TURNS[:1], list(TURNS))
    assert pickle.loads(pickle.dumps(one)) == TURNS
    assert type(pickle.loads(pickle.dumps(one))) is tuple


def test_a_pickled_split_goes_on_without_hashing_its_shards_again(tmp_path, monkeypatch):
    split = Split(write_shards(tmp_path, {"train": clips(9)}, group=2), "train")
    before = [clip.labels.tolist() for clip in split.epoch(1, 1)]
    content = pickle.dumps(split)
    monkeypatch.setattr(shards, "_verify", lambda *_: pytest.fail("hashed again"))
    again = pickle.loads(content)
    assert len(content) < 10_000  # nothing of what was read
    assert (again.key, again.name, len(again)) == (split.key, "train", 9)
    assert [clip.labels.tolist() for clip in again.epoch(1, 1)] == before


# ---- what can be wrong -------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("head", "frame"), [(0, 7), (1, 1)])
def test_labels_that_the_draw_does_not_give_are_refused(tmp_path, head, frame):
    written = clips(5)
    labels = written[3].labels.copy()
    found, expected = (0, -100) if labels[head, frame] == -100 else (-100, 0)
    labels[head, frame] = found
    written[3] = dataclasses.replace(written[3], labels=labels)
    split = Split(write_shards(tmp_path, {"train": written}), "train")
    message = (
        rf"part-00000.parquet clip c3 frame {10 + frame}: {('speaking', 'dst_update')[head]}_label is {found}, "
        rf"but sampling_seed and neg_rate give {expected}; run preprocess again"
    )
    for read in (split.in_order(), split.epoch(0, 1), split.label_stream(0, 0)):
        with pytest.raises(InputError, match=message):
            next(read)


def test_stored_labels_are_checked_once_per_group(tmp_path, monkeypatch):
    split = Split(write_shards(tmp_path, {"train": clips(12)}, group=2), "train")
    checked, check = [], shards._Group.check_draw
    monkeypatch.setattr(shards._Group, "check_draw", lambda group: checked.append(group.where.index) or check(group))
    for epoch in range(3):
        list(split.label_stream(0, epoch))
    assert sorted(checked) == [0, 1, 2, 3, 4, 5]


def reseal(folder: Path) -> None:
    """Have the manifest agree with whatever lies there now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        content = (folder / shard["path"]).read_bytes()
        shard |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


FORGED = {
    "another clip's frame": ("frames", lambda row: row | {"clip_id": "c1"}, "clip_id, clip and frame are not those"),
    "frames out of order": ("frames", lambda row: row | {"frame": row["frame"] + 1}, "clip_id, clip and frame are not"),
    "a frame of no clip": ("frames", lambda row: row | {"clip": 7}, "clip_id, clip and frame are not those"),
    "a label of 7": ("frames", lambda row: row | {"speaking_label": 7}, "speaking_label is 7, but"),
    "a wrong place": ("clips", lambda row: row | {"clip": 1}, r"clip is not the clip's place in its split \(row 0\)"),
    "an end that does not fit": ("clips", lambda row: row | {"end_frame": 99}, "num_frames are no range"),
    "no frames": ("clips", lambda row: row | {"end_frame": 10, "num_frames": 0}, "num_frames are no range"),
    "NaN frames a second": ("clips", lambda row: row | {"fps": float("nan")}, "fps is no positive number"),
    "a rate of 2": ("clips", lambda row: row | {"neg_rate": 2.0}, "neg_rate is no rate"),
    "an unknown rule": ("clips", lambda row: row | {"positive": "both"}, "positive 'both' is not known"),
    "a stranger": ("clips", lambda row: row | {"turns": [row["turns"][0] | {"role": "narrator"}]}, "role 'narrator'"),
    "a turn that ends before": (
        "clips", lambda row: row | {"turns": [row["turns"][0] | {"end_frame": 3}]}, "are no range"
    ),
    "a transition": (
        "clips",
        lambda row: row | {"turns": [row["turns"][2] | {"updates": [{"id": "S1", "transition": "fly"}]}]},
        "transition 'fly' is not known",
    ),
    "a state": ("clips", lambda row: row | {"initial_state": [{"id": "S1", "state": "odd"}]}, "state 'odd' is not"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_forged_rows_under_a_manifest_that_agrees_are_refused_by_the_file(tmp_path, name):
    table, change, message = FORGED[name]
    path = write_shards(tmp_path, {"train": clips(3)}) / table / "split=train" / "part-00000.parquet"
    rows = pq.read_table(path, partitioning=None)
    first, *rest = rows.to_pylist()
    pq.write_table(pa.Table.from_pylist([change(first), *rest], schema=rows.schema), path)
    reseal(tmp_path)
    with pytest.raises(InputError, match=rf"{table}/split=train/part-00000\.parquet.*{message}") as caught:
        list(Split(tmp_path, "train").in_order(rate=None))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["type", "drop", "null", "order", "no Parquet"])
def test_columns_that_are_not_the_schema_s_are_refused_by_name(tmp_path, change):
    path = write_shards(tmp_path, {"train": clips(3)}) / "clips" / "split=train" / "part-00000.parquet"
    rows = pq.read_table(path, partitioning=None)
    at = rows.schema.get_field_index("fps")
    made = {
        "type": lambda: rows.set_column(at, "fps", rows["fps"].cast(pa.float64())),
        "drop": lambda: rows.drop_columns(["fps"]),
        "null": lambda: rows.set_column(at, pa.field("fps", pa.float64()), pa.array([None, 2, 2], pa.float64())),
        "order": lambda: rows.select([*rows.column_names[:at], *rows.column_names[at + 1 :], "fps"]),
    }
    if change == "no Parquet":
        path.write_bytes(b"PAR1 but no more")
    else:
        pq.write_table(made[change](), path)
    reseal(tmp_path)
    expected = r"part-00000\.parquet: " + (
        "can't be read" if change == "no Parquet" else "column fps is not the schema"
    )
    with pytest.raises(InputError, match=expected):
        Split(tmp_path, "train")


def test_a_manifest_whose_shards_cannot_be_is_refused(tmp_path):
    path = write_shards(tmp_path, {"train": clips(2)}) / "manifest.json"
    manifest = json.loads(path.read_text())
    for change in ({"path": "../x"}, {"part": 1.0}, {"table": "labels"}, {"clips": -1}, {"split": "val"}):
        shards = [manifest["shards"][0] | change, *manifest["shards"][1:]]
        path.write_text(json.dumps(manifest | {"shards": shards}))
        with pytest.raises(InputError, match=r"manifest\.json: not a manifest \("):
            Split(tmp_path, "train")
    path.write_text(json.dumps(manifest | {"shards": manifest["shards"] * 2}))
    with pytest.raises(InputError, match=r"manifest\.json: lists a shard of train twice"):
        Split(tmp_path, "train")


def test_frames_that_do_not_add_up_to_the_clips_are_refused(tmp_path):
    path = write_shards(tmp_path, {"train": clips(3)}) / "frames" / "split=train" / "part-00000.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    reseal(tmp_path)
    with pytest.raises(InputError, match=r"row group 0: 38 frames, expected 39 as its clips say; run preprocess"):
        next(Split(tmp_path, "train").in_order())

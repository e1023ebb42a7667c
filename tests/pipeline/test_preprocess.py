"""`preprocess` as a user meets it: files in, shards out; complete, or absent."""

import pickle
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from made_up import run, run_on, snapshot, toy_clip, toy_output, turn, written

from pipeline import storage
from pipeline.cli import main
from pipeline.dataset import verify
from pipeline.errors import InputError
from pipeline.preprocess import preprocess
from pipeline.schema import CLIPS, FRAMES, sampling_seed
from pipeline.synth import write_frames


def clip(name="a", start=10, end=20, turns=None, **more):
    turns = [turn("assistant", "Now.", 6.0, 12, 14)] if turns is None else turns
    return toy_clip(name, start, end, turns, steps=1) | more


def many(count):
    starts = [12 + i % 20 for i in range(count)]
    return [clip(f"c{i}", 10, 60, [turn("assistant", "x", at / 2, at, at + 2)]) for i, at in enumerate(starts)]


def test_a_clip_becomes_rows(tmp_path):
    out = run(tmp_path, [clip(neg_frame_sampling_rate=1.0)])
    table = out.frames()
    assert table["frame"].to_list() == list(range(10, 20))
    assert table["time_s"].to_list() == [f / 2 for f in range(10, 20)]
    assert table["speaking_label"].to_list() == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert table["dst_update_label"].to_list() == [0] * 10
    (row,) = out.clips()
    assert (row["start_frame"], row["end_frame"], row["num_frames"], row["n_speaking"]) == (10, 20, 10, 2)
    assert (row["neg_rate"], row["positive"], row["frame_convention"]) == (1.0, "span", "event")
    assert row["steps"] == [{"id": "S1", "name": "part 1"}]
    assert row["turns"][0] == {
        "role": "assistant", "text": "Now.", "start_frame": 12, "end_frame": 14, "time_s": 6.0, "updates": []
    }  # fmt: skip
    for name, schema in (("frames", FRAMES), ("clips", CLIPS)):
        found = pq.read_schema(tmp_path / f"out/{name}/split=train/part-00000.parquet")
        assert found.equals(schema, check_metadata=True)


def test_rational_rates_are_exact_and_may_be_written_as_a_fraction(tmp_path):
    rates = [24000 / 1001, "24000/1001", "30000/1001", 2, 29.97, "24000/0"]
    found = run(tmp_path, [clip(str(i), turns=[], fps=rate) for i, rate in enumerate(rates)]).clips()
    fps = [24000 / 1001, 24000 / 1001, 30000 / 1001, 2.0, 29.97]
    assert [(row["clip_id"], row["fps"]) for row in found] == list(zip("01234", fps, strict=True))


def test_clips_of_different_data_sets_may_have_one_id_but_not_of_the_same(tmp_path):
    given = [clip(), clip(video_uid="other", dataset="wtag"), clip(video_uid="other", dataset="wtag", start=9)]
    out = run(tmp_path, given)
    assert (out.manifest["quarantined"], out.manifest["inputs"][0]["renamed"]) == (1, 1)
    seeds = [sampling_seed(0, name) for name in ("a", "a_wtag_other")]
    rows = [(row["clip_id"], row["video_uid"], row["sampling_seed"]) for row in out.clips()]
    assert rows == [("a", "video of a", seeds[0]), ("a_wtag_other", "other", seeds[1])]
    assert out.frames()["clip_id"].unique(maintain_order=True).to_list() == ["a", "a_wtag_other"]


def test_padding_stops_at_frame_0_and_at_neighbours(tmp_path):
    here = {"video_uid": "v"}
    made = [clip("a", 3, 10, **here), clip("b", 14, 20, **here), clip("c", 14, 22, **here), clip("d", 3, 9)]
    # a: to frame 0, and right up to b at 14; b, c overlap, so they are no neighbours of each other
    assert run(tmp_path, made, pad_s=2.5).bounds() == [(0, 14), (10, 25), (10, 27), (0, 14)]


def test_recordings_span_camera_views(tmp_path):
    names = ["assembly_nusar-1_x__HMC_1", "disassembly_nusar-1_x__HMC_2", "other__cam"]
    made = [clip(name, video_uid=name) for name in names]
    assert [row["recording_id"] for row in run(tmp_path, made).clips()] == ["nusar-1_x", "nusar-1_x", "other__cam"]
    assert run(tmp_path, made, recording_regex="^(.*)__").clips()[2]["recording_id"] == "other"


def test_drops_are_counted_by_reason(tmp_path):
    ranges = [("assistant", 0, 5), ("assistant", 13, 13), ("assistant", None, None), ("user", 0, 1)]
    turns = [turn(role, "x", None, *frames) for role, *frames in ranges]
    made = clip(turns=[*turns, turn("DST_UPDATE", "S1 start", None, 18, 25)])
    counts = run(tmp_path, [made], frame_convention="event").manifest["splits"]["train"]
    assert counts["drops"] == {"no frames": 1, "empty range": 1, "outside the clip": 1}
    assert counts["turns_cut"] == 1


def test_the_manifest_counts_what_the_shards_hold(tmp_path):
    out = run(tmp_path, [*many(300), clip("quiet", turns=[turn("user", "x", 6.0, 12, 14)], dst=[])])
    counts, frames = out.manifest["splits"]["train"], out.frames()
    speaking, dst_update = frames["speaking_label"], frames["dst_update_label"]
    assert (counts["clips"], counts["frames"]) == (301, frames.height)
    assert counts["both_positive"] == ((speaking == 1) & (dst_update == 1)).sum()
    assert counts["supervised"] == ((speaking != -100) | (dst_update != -100)).sum()
    between = frames.filter(speaking == 1).select("clip", pl.col("frame").diff().over("clip") - 1)
    between = between.filter(pl.col("frame") > 0)["frame"]
    gaps = counts["speaking_gaps"]
    assert (sum(n for _, n in gaps), sum(s * n for s, n in gaps)) == (len(between), between.sum() / 2)  # 2 fps


def test_hazards_are_named(tmp_path):
    both = [turn("assistant", "x", 5.0, 10, 19), turn("DST_UPDATE", "S1 start", 5.0, 10, 19)]
    regular = [turn("assistant", "x", at / 2, at, at + 1) for at in range(12, 122, 5)]  # 21 gaps of 2 s
    files = {
        "train_x.json": [clip("a", turns=both, video_uid="shared")],
        "val_x.json": [clip("b", video_uid="shared")],
        "test_x.json": [clip("c", 10, 130, regular, dst=[])],
    }
    paths = [written(tmp_path / name, clips) for name, clips in files.items()]
    out = run_on(paths, tmp_path, frames_root=str(tmp_path), frame_convention="event")
    assert {(h["split"], h["name"]) for h in out.manifest["hazards"]} == {
        ("train", "implausible positive rate"),
        ("train", "events at the first frame"),
        ("train", "heads coincide"),
        ("val", "head without positives"),
        ("test", "head without positives"),
        ("test", "events at a fixed period"),
        ("train+val", "recording in several splits"),
        *((split, "frames missing") for split in ("train", "val", "test")),
    }


def test_views_that_count_as_recordings_are_a_hazard(tmp_path):
    uids = ["r1__head", "r1__side", "r2__head", "r3_cam1", "r3_cam2", "r4_cam1", "d__a", "d__b", "sea_side", "sea_view"]
    clips = [clip(uid, video_uid=uid) for uid in uids]
    text = run(tmp_path, clips).hazards()["views counted as recordings"]
    assert text.startswith("4 videos look like camera views of 2 recordings, e.g. r1__head, r1__side, r3_cam1, but")
    pattern = text.rpartition("--recording-regex ")[2].strip("'")
    out = run(tmp_path, clips, recording_regex=pattern)
    assert [row["recording_id"] for row in out.clips()][:6] == ["r1", "r1", "r2", "r3", "r3", "r4"]
    assert "views counted as recordings" not in out.hazards()


def test_frames_below_a_relative_root_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path, [clip()], frames_root=".").manifest["options"]["frames_root"] == str(tmp_path)


def test_frames_on_disk_are_held_against_the_annotations(tmp_path):
    root = tmp_path / "frames"
    root.mkdir()
    write_frames(root / "video of short.arrow", np.zeros((15, 8, 8, 3), np.uint8))
    write_frames(root / "video of long.arrow", np.zeros((25, 8, 8, 3), np.uint8))
    (root / "video of bad.arrow").write_bytes(b"no arrow")
    (root / "video of many").mkdir()
    for i in range(120):
        (root / "video of many" / f"{i}.jpg").touch()
    out = run(tmp_path, [clip(n) for n in ("short", "long", "bad", "many")], frames_root=str(root), pad_s=2)
    told = {name: text for name, text in out.hazards().items() if "frames" in name or "annot" in name}
    rate = "frames perhaps at another rate than the clips'"
    assert set(told) == {"annotations longer than the frames", "frames unreadable", rate}
    assert "video of many (annotated to 24 at 2 a second, has 120)" in told[rate]
    assert "video of short (annotated to 20, has 15)" in told["annotations longer than the frames"]
    assert [end for _, end in out.bounds()] == [20, 24, 24, 24]  # padding ends with the frames


def test_an_unchanged_input_is_skipped_and_a_changed_one_is_not(tmp_path):
    source = written(tmp_path / "train_x.json", [clip(), {"video_uid": "broken"}])
    arguments = ["preprocess", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 3
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.parquet")}

    def skips(*options):
        assert main([*arguments, *options]) == 3  # as the first time
        skipped = {p: p.stat().st_mtime_ns for p in before} == before
        before.update({p: p.stat().st_mtime_ns for p in before})
        return skipped

    assert skips()
    assert not skips("--seed", "1")
    written(source, [clip(end=21)])
    assert main(arguments) == 0
    assert not (tmp_path / "out/quarantine.jsonl").exists()


def test_parts_done_elsewhere_and_in_any_order_give_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.preprocess.PART_CLIPS", 100)
    made = many(250)
    made[150] = {"video_uid": "broken"}
    made[220] = made[10]
    source = written(tmp_path / "train_x.json", made)

    def elsewhere(function, calls):
        """As processes do: copies of calls, the last call first."""
        yield from reversed([function(*pickle.loads(pickle.dumps(call))) for call in reversed(calls)])

    preprocess([source], tmp_path / "out1")
    preprocess([source], tmp_path / "out2", mapper=elsewhere)
    assert snapshot(tmp_path / "out1") == snapshot(tmp_path / "out2")
    parts = [pq.ParquetFile(p).metadata.num_rows for p in sorted((tmp_path / "out1/clips/split=train").iterdir())]
    assert parts == [100, 99, 49]


def test_a_second_run_into_one_folder_and_one_over_a_users_own_frames_are_refused(tmp_path):
    with storage.lock(tmp_path / "out" / ".lock", ValueError()), pytest.raises(InputError, match="another run"):
        run(tmp_path, [clip()])
    (tmp_path / "out/frames").mkdir(parents=True)
    (tmp_path / "out/frames/video.arrow").touch()
    with pytest.raises(InputError, match="is no shard"):
        run(tmp_path, [clip()])
    assert (tmp_path / "out/frames/video.arrow").exists()


def test_an_edited_shard_a_missing_one_and_a_stray_one_are_named(tmp_path):
    folder = toy_output(tmp_path).folder
    path = folder / "frames/split=train/part-00000.parquet"
    body = path.read_bytes()
    for change, message in (
        (lambda: path.write_bytes(body[:100] + bytes([body[100] ^ 1]) + body[101:]), "damaged, SHA-256 differs"),
        (path.unlink, "missing"),
        (lambda: [p.write_bytes(body) for p in (path, path.with_name("part-00007.parquet"))], "does not list"),
    ):
        change()
        with pytest.raises(InputError, match=message):
            verify(folder)


@pytest.mark.parametrize("step", range(9))
def test_a_commit_that_stops_midway_leaves_the_old_output_or_none_and_the_next_finishes(tmp_path, monkeypatch, step):
    run(tmp_path, [clip()])
    before = snapshot(tmp_path / "out")
    rename, count = Path.rename, iter(range(100))

    def failing(self, target):
        if next(count) == step:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [clip(), clip("b")])
    monkeypatch.undo()
    assert snapshot(tmp_path / "out") == before or not (tmp_path / "out/manifest.json").exists()
    assert run(tmp_path, [clip(), clip("b")]).manifest["splits"]["train"]["clips"] == 2


def test_links_that_lead_nowhere_or_upwards_are_passed_over_and_a_failed_run_leaves_no_folder(tmp_path):
    raw = tmp_path / "raw"
    (raw / "frames").mkdir(parents=True)
    written(raw / "train.json", [clip()])
    (raw / "gone_train.json").symlink_to(tmp_path / "nothing.json")
    for name in ("x", "y"):  # followed without end, two such links would take for ever
        (raw / "frames" / name).symlink_to(raw, target_is_directory=True)
    assert main(["preprocess", str(raw), "--out", str(tmp_path / "out"), "--frames-root", str(raw)]) == 0
    assert main(["preprocess", str(raw / "train.json"), "--out", str(tmp_path / "new"), "--bounds", "odd"]) == 2
    (tmp_path / "empty_train.json").write_text("[]")
    assert main(["preprocess", str(tmp_path / "empty_train.json"), "--out", str(tmp_path / "new")]) == 1
    assert not (tmp_path / "new").exists()

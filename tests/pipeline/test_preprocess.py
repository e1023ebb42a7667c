"""`preprocess` as a user meets it: files in, shards out; complete, or absent."""

import fcntl
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up import run, run_on, turn, written

from pipeline import output
from pipeline.cli import main
from pipeline.errors import InputError
from pipeline.preprocess import preprocess
from pipeline.schema import CLIPS, FRAMES, sampling_seed
from pipeline.summary import splits_of
from pipeline.synth import write_frames


def clip(name="a", start=10, end=20, turns=None, **more):
    conversation = [turn("assistant", "Now.", 6.0, 12, 14)] if turns is None else turns
    steps = [{"id": "S1", "name": "Attach the wheels"}]
    made = {"id": name, "video_uid": f"video-{name}", "conversation": conversation, "dst": steps, "fps": 2}
    return made | {"start_frame_idx": start, "end_frame_idx": end} | more


def many(count):
    starts = [12 + i % 20 for i in range(count)]
    return [clip(f"c{i}", 10, 60, [turn("assistant", "x", at / 2, at, at + 2)]) for i, at in enumerate(starts)]


def snapshot(folder: Path):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- labels and columns end to end -------------------------------------------------------------------


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
    assert row["steps"] == [{"id": "S1", "name": "Attach the wheels"}]
    assert row["turns"][0] == {
        "role": "assistant", "text": "Now.", "start_frame": 12, "end_frame": 14, "time_s": 6.0, "updates": []
    }  # fmt: skip
    for name, schema in (("frames", FRAMES), ("clips", CLIPS)):
        found = pq.read_schema(tmp_path / f"out/{name}/split=train/part-00000.parquet")
        assert found.equals(schema, check_metadata=True)


def test_rational_rates_are_exact_and_may_be_written_as_a_fraction(tmp_path):
    rates = [24000 / 1001, "24000/1001", "30000/1001", 2, 29.97, "24000/0", "1001", "a/b"]
    found = run(tmp_path, [clip(str(i), turns=[], fps=rate) for i, rate in enumerate(rates)]).clips()
    fps = [24000 / 1001, 24000 / 1001, 30000 / 1001, 2.0, 29.97]
    assert [(row["clip_id"], row["fps"]) for row in found] == list(zip("01234", fps, strict=True))


def test_clips_of_different_data_sets_may_have_one_id_but_not_of_the_same(tmp_path):
    given = [clip(), clip(video_uid="other", dataset="wtag"), clip(video_uid="other", dataset="wtag", start=9)]
    out = run(tmp_path, given)
    assert (out.manifest["quarantined"], out.manifest["inputs"][0]["renamed"]) == (1, 1)
    seeds = [sampling_seed(0, name) for name in ("a", "a_wtag_other")]
    rows = [(row["clip_id"], row["video_uid"], row["sampling_seed"]) for row in out.clips()]
    assert rows == [("a", "video-a", seeds[0]), ("a_wtag_other", "other", seeds[1])]
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
    turns = [
        *(turn(role, "x", None, *frames) for role, *frames in ranges),
        turn("DST_UPDATE", "S1 start", None, 18, 25),
    ]
    counts = run(tmp_path, [clip(turns=turns)], frame_convention="event").manifest["splits"]["train"]
    assert counts["drops"] == {"no frames": 1, "empty range": 1, "outside the clip": 1}
    assert counts["turns_cut"] == 1


def test_the_manifest_counts_what_the_shards_hold(tmp_path):
    out = run(tmp_path, [*many(300), clip("quiet", turns=[turn("user", "x", 6.0, 12, 14)], dst=[])])
    (split,), frames = splits_of(out.manifest), out.frames()
    speaking, dst_update = frames["speaking_label"] == 1, frames["dst_update_label"] == 1
    assert (split.clips, split.frames) == (301, frames.height)
    assert split.both == (speaking & dst_update).sum()
    assert split.not_sampled == ((frames["speaking_label"] == -100) & (frames["dst_update_label"] == -100)).sum()
    between = frames.filter(speaking).select("clip", pl.col("frame").diff().over("clip") - 1)
    between = between.filter(pl.col("frame") > 0)["frame"]
    gaps = split.heads["speaking"].gaps
    assert (sum(gaps.values()), sum(s * n for s, n in gaps.items())) == (len(between), between.sum() / 2)  # 2 fps
    files = [pq.ParquetFile(tmp_path / f"out/{t}/split=train/part-00000.parquet") for t in ("frames", "clips")]
    groups = [[f.read_row_group(i, ["clip"])["clip"].unique().to_pylist() for i in range(2)] for f in files]
    assert groups[0] == groups[1] == [list(range(256)), list(range(256, 301))]


def test_hazards_are_named(tmp_path):
    both = [turn("assistant", "x", 5.0, 10, 19), turn("DST_UPDATE", "S1 start", 5.0, 10, 19)]
    first = written(tmp_path / "train_x.json", [clip("a", turns=both, video_uid="shared")])
    second = written(tmp_path / "val_x.json", [clip("b", video_uid="shared")])
    out = run_on([first, second], tmp_path, frames_root=str(tmp_path))
    assert {(h["split"], h["name"]) for h in out.manifest["hazards"]} == {
        ("train", "implausible positive rate"),
        ("train", "events at the first frame"),
        ("train", "heads coincide"),
        ("val", "head without positives"),
        ("train+val", "recording in several splits"),
        ("train", "frames missing"),
        ("val", "frames missing"),
    }


def test_frames_on_disk_are_held_against_the_annotations(tmp_path):
    root = tmp_path / "frames"
    root.mkdir()
    write_frames(root / "video-short.arrow", np.zeros((15, 8, 8, 3), np.uint8))
    write_frames(root / "video-long.arrow", np.zeros((25, 8, 8, 3), np.uint8))
    table = pa.table({"frame": ["x"] * 12})
    with pa.OSFile(str(root / "video-file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    (root / "video-bad.arrow").write_bytes(b"no arrow")
    out = run(tmp_path, [clip(n) for n in ("short", "long", "file", "bad")], frames_root=str(root), pad_s=2)
    told = {name: text for name, text in out.hazards().items() if "frames" in name or "annot" in name}
    assert set(told) == {"annotations longer than the frames", "frames unreadable"}
    assert "video-short (annotated to 20, has 15)" in told["annotations longer than the frames"]
    assert "video-file (annotated to 20, has 12)" in told["annotations longer than the frames"]
    assert [end for _, end in out.bounds()] == [20, 24, 20, 24]  # padding ends with the frames


# ---- complete or absent ------------------------------------------------------------------------------


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
    (tmp_path / "out/quarantine.jsonl").unlink()
    assert not skips("--seed", "1")
    assert (tmp_path / "out/quarantine.jsonl").exists()
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
        """As processes do: copies of calls and results, the last call first."""
        results = [pickle.dumps(function(*pickle.loads(pickle.dumps(call)))) for call in reversed(calls)]
        yield from map(pickle.loads, reversed(results))

    preprocess([source], tmp_path / "out1")
    preprocess([source], tmp_path / "out2", mapper=elsewhere)
    assert snapshot(tmp_path / "out1") == snapshot(tmp_path / "out2")
    parts = [pq.ParquetFile(p).metadata.num_rows for p in sorted((tmp_path / "out1/clips/split=train").iterdir())]
    assert parts == [100, 99, 49]


def test_a_second_run_into_one_folder_refuses(tmp_path):
    out = tmp_path / "out"
    (out / ".staging-of-the-other").mkdir(parents=True)
    with (out / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is writing there"):
            run(tmp_path, [clip()])
    assert (out / ".staging-of-the-other").exists()
    run(tmp_path, [clip()])


def test_a_users_own_frames_folder_is_never_replaced(tmp_path):
    video = tmp_path / "out/frames/video.arrow"
    video.parent.mkdir(parents=True)
    video.touch()
    with pytest.raises(InputError, match="is no shard"):
        run(tmp_path, [clip()])
    assert video.exists()


def test_killed_between_the_renames_the_next_run_does_the_work(tmp_path, monkeypatch):
    """`left`: what is on disk at that moment."""
    run(tmp_path, [clip()])
    out, left, sync = tmp_path / "out", tmp_path / "left", output.sync

    def copying(path):
        if path == out and not left.exists():
            shutil.copytree(out, left)
        sync(path)

    monkeypatch.setattr(output, "sync", copying)
    run(tmp_path, [clip(), clip("b")])
    assert not (left / "manifest.json").exists()  # neither old nor new claims to be complete
    preprocess([tmp_path / "in/train.json"], left)
    assert output.verify(left)
    assert pl.read_parquet(left / "clips/**/*.parquet").height == 2


@pytest.mark.parametrize("step", range(6))
def test_a_commit_that_fails_midway_brings_the_old_output_back(tmp_path, monkeypatch, step):
    run(tmp_path, [clip()])
    before = snapshot(tmp_path / "out")
    rename, count = Path.rename, iter(range(100))

    def failing(self, target):
        if next(count) == step:
            raise PermissionError(13, "Permission denied") if step % 2 else KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((InputError, KeyboardInterrupt)):
        run(tmp_path, [clip(), clip("b")])
    monkeypatch.undo()
    assert snapshot(tmp_path / "out") == before
    assert output.verify(tmp_path / "out")


def test_a_name_that_tells_no_split_is_bad_usage(tmp_path, capsys):
    (tmp_path / "clips").mkdir()  # pytest's own folder has the token test in its name
    arguments = ["preprocess", str(written(tmp_path / "clips/trainer.json", [clip()])), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "--split" in capsys.readouterr().err
    assert main([*arguments, "--split", "dev", "--workers", "1"]) == 0
    assert json.loads((tmp_path / "out/manifest.json").read_text())["splits"]["dev"]["neg_rates"] == [1.0]

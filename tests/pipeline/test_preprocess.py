"""`preprocess` as a user meets it: files in, shards out; complete, or absent."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import output as shards
from pipeline.errors import InputError
from pipeline.options import Options
from pipeline.preprocess import preprocess
from pipeline.schema import CLIPS, FRAMES, sampling_seed
from pipeline.summary import splits_of
from pipeline.synth import write_frames
from trainer.cli import main


def turn(role, start=None, end=None, time_s=None, content=None):
    made = {"role": role, "content": content if content is not None else f"{role} text"}
    if role == "DST_UPDATE" and content is None:
        made["content"] = [{"id": "S1", "transition": "start"}]
    numbers = {"start_frame": start, "end_frame": end, "time": time_s}
    return made | {key: value for key, value in numbers.items() if value is not None}


def clip(name="a", start=10, end=20, turns=None, **more):
    conversation = [turn("assistant", 12, 14, 6.0)] if turns is None else turns
    steps = [{"id": "S1", "name": "Attach the wheels"}]
    made = {"id": name, "video_uid": f"video-{name}", "conversation": conversation, "dst": steps, "fps": 2}
    return made | {"start_frame_idx": start, "end_frame_idx": end} | more


def write(path: Path, clips) -> Path:
    path.write_text(json.dumps(clips))
    return path


def run(tmp_path, clips, name="train_training.json", **options):
    source = write(tmp_path / name, clips)
    manifest, _ = preprocess([source], tmp_path / "out", Options(**options))
    return manifest


def frames(out: Path, split="train"):
    return pl.read_parquet(out / f"frames/split={split}/*.parquet", hive_partitioning=False)


def clips_of(out: Path, split="train"):
    return pl.read_parquet(out / f"clips/split={split}/*.parquet", hive_partitioning=False)


def labels(out: Path, head="speaking_label", split="train"):
    return frames(out, split).group_by("clip_id", maintain_order=True).agg(head)[head].to_list()


def snapshot(folder: Path):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- labels and columns end to end -------------------------------------------------------------------


def test_a_clip_becomes_rows(tmp_path):
    run(tmp_path, [clip(neg_frame_sampling_rate=1.0)])
    out = tmp_path / "out"
    table = frames(out)
    assert table["frame"].to_list() == list(range(10, 20))
    assert table["time_s"].to_list() == [f / 2 for f in range(10, 20)]
    assert table["speaking_label"].to_list() == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert table["dst_update_label"].to_list() == [0] * 10
    row = clips_of(out).row(0, named=True)
    assert (row["start_frame"], row["end_frame"], row["num_frames"], row["n_speaking"]) == (10, 20, 10, 2)
    assert (row["neg_rate"], row["positive"], row["frame_convention"]) == (1.0, "span", "event")
    assert row["steps"] == [{"id": "S1", "name": "Attach the wheels"}]
    assert row["turns"][0] == {
        "role": "assistant", "text": "assistant text", "start_frame": 12, "end_frame": 14, "time_s": 6.0, "updates": []
    }  # fmt: skip


def test_files_carry_the_schema_exactly(tmp_path):
    run(tmp_path, [clip()])
    for table, schema in (("frames", FRAMES), ("clips", CLIPS)):
        found = pq.read_schema(tmp_path / f"out/{table}/split=train/part-00000.parquet")
        assert found.equals(schema, check_metadata=True)


def test_rational_rates_are_exact_and_may_be_written_as_a_fraction(tmp_path):
    rates = [24000 / 1001, "24000/1001", "30000/1001", 2, 29.97, "24000/0", "1001", "a/b"]
    run(tmp_path, [clip(str(i), turns=[], fps=rate) for i, rate in enumerate(rates)])
    found = clips_of(tmp_path / "out")
    assert found["clip_id"].to_list() == ["0", "1", "2", "3", "4"]
    assert found["fps"].to_list() == [24000 / 1001, 24000 / 1001, 30000 / 1001, 2.0, 29.97]


def test_clips_of_different_data_sets_may_have_one_id_but_not_of_the_same(tmp_path):
    given = [clip(), clip(video_uid="other", dataset="wtag"), clip(video_uid="other", dataset="wtag", start=9)]
    manifest = run(tmp_path, given)
    assert manifest["quarantined"] == 1
    assert manifest["inputs"][0]["renamed"] == 1
    rows = clips_of(tmp_path / "out").select("clip_id", "video_uid", "sampling_seed").rows()
    seeds = [sampling_seed(0, name) for name in ("a", "a_wtag_other")]
    assert rows == [("a", "video-a", seeds[0]), ("a_wtag_other", "other", seeds[1])]
    assert frames(tmp_path / "out")["clip_id"].unique(maintain_order=True).to_list() == ["a", "a_wtag_other"]


def test_padding_stops_at_frame_0_and_at_neighbours(tmp_path):
    here = {"video_uid": "v"}
    made = [clip("a", 3, 10, **here), clip("b", 14, 20, **here), clip("c", 14, 22, **here), clip("d", 3, 9)]
    run(tmp_path, made, pad_s=2.5)
    found = clips_of(tmp_path / "out").select("start_frame", "end_frame").rows()
    # a: to frame 0, and right up to b at 14; b, c overlap, so they are no neighbours of each other
    assert found == [(0, 14), (10, 25), (10, 27), (0, 14)]


def test_recordings_span_camera_views(tmp_path):
    names = ["assembly_nusar-1_x__HMC_1", "disassembly_nusar-1_x__HMC_2", "other__cam"]
    made = [clip(name, video_uid=name) for name in names]
    run(tmp_path, made)
    assert clips_of(tmp_path / "out")["recording_id"].to_list() == ["nusar-1_x", "nusar-1_x", "other__cam"]
    run(tmp_path, made, recording_regex="^(.*)__")
    assert clips_of(tmp_path / "out")["recording_id"].to_list()[2] == "other"


F0, F1, F2 = ({"role": "frames", "start": 5 * i + 10, "end": 5 * i + 15} for i in range(3))


@pytest.mark.parametrize(
    ("turns", "heard"),
    [
        ([F0, turn("user"), F1, F2, turn("assistant")], [(15, 16)]),  # by the next frame, when frames follow
        ([F0, turn("user"), F1], [(15, 16)]),
        ([F0, turn("user", content="a"), F1, turn("user", content="b"), F2], [(15, 16), (20, 21)]),
        ([F0, turn("user", content="a"), turn("user", content="b"), turn("assistant")], [(14, 15), (14, 15)]),
    ],
)
def test_a_user_turn_between_frames_is_heard_once(tmp_path, turns, heard):
    run(tmp_path, [clip(end=30, turns=turns)])
    found = clips_of(tmp_path / "out").row(0, named=True)["turns"]
    assert [(t["start_frame"], t["end_frame"]) for t in found if t["role"] == "user"] == heard


def test_drops_are_counted_by_reason(tmp_path):
    turns = [
        turn("assistant", 0, 5),
        turn("assistant", 13, 13),
        turn("assistant"),
        turn("DST_UPDATE", 18, 25),
        turn("user", 0, 1),
    ]
    counts = run(tmp_path, [clip(turns=turns)], frame_convention="event")["splits"]["train"]
    assert counts["drops"] == {"no frames": 1, "empty range": 1, "outside the clip": 1}
    assert counts["turns_cut"] == 1


def test_the_manifest_counts_what_the_shards_hold(tmp_path):
    quiet = clip("quiet", turns=[turn("user", 12, 14, 6.0)], dst=[])
    manifest, _ = preprocess([write(tmp_path / "train_x.json", [*many(300), quiet])], tmp_path / "out")
    (split,) = splits_of(manifest)
    frames = pl.read_parquet(tmp_path / "out/frames/split=train/*.parquet")
    speaking, dst_update = frames["speaking_label"] == 1, frames["dst_update_label"] == 1
    assert (split.clips, split.frames) == (301, frames.height)
    assert split.both == (speaking & dst_update).sum()
    assert split.not_sampled == ((frames["speaking_label"] == -100) & (frames["dst_update_label"] == -100)).sum()
    between = (
        frames.filter(speaking).select("clip", pl.col("frame").diff().over("clip") - 1).filter(pl.col("frame") > 0)
    )
    assert sum(split.heads["speaking"].gaps.values()) == between.height
    assert (
        sum(s * n for s, n in split.heads["speaking"].gaps.items()) == between["frame"].sum() / 2
    )  # 2 frames a second


# ---- hazards -----------------------------------------------------------------------------------------


def test_hazards_are_named(tmp_path):
    first = clip("a", turns=[turn("assistant", 10, 19, 5.0), turn("DST_UPDATE", 10, 19, 5.0)], video_uid="shared")
    sources = [
        write(tmp_path / "train_x.json", [first]),
        write(tmp_path / "val_x.json", [clip("b", video_uid="shared")]),
    ]
    manifest, _ = preprocess(sources, tmp_path / "out", Options(frames_root=str(tmp_path)))
    found = {(h["split"], h["name"]) for h in manifest["hazards"]}
    assert found == {
        ("train", "implausible positive rate"),
        ("train", "events at the first frame"),
        ("train", "heads coincide"),
        ("val", "head without positives"),
        ("train+val", "recording in several splits"),
        ("train", "frames missing"),
        ("val", "frames missing"),
    }


# ---- complete or absent ------------------------------------------------------------------------------


def test_an_unchanged_input_is_skipped_and_a_changed_one_is_not(tmp_path):
    source = write(tmp_path / "train_x.json", [clip(), {"video_uid": "broken"}])
    out = tmp_path / "out"
    assert preprocess([source], out)[1] is False
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")}
    manifest, skipped = preprocess([source], out)
    assert skipped
    assert manifest["status"] == 3  # as the first time
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")} == before
    assert preprocess([source], out, Options(seed=1))[1] is False
    write(source, [clip(end=21)])
    assert preprocess([source], out, Options(seed=1))[1] is False
    assert not (out / "quarantine.jsonl").exists()


def many(count=700):
    return [
        clip(f"c{i}", 10, 60, [turn("assistant", 12 + i % 20, 14 + i % 20, (12 + i % 20) / 2)]) for i in range(count)
    ]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr("pipeline.preprocess.PART_CLIPS", 100)


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, small_parts):
    made = many()
    made[150] = {"video_uid": "broken"}
    made[320] = made[10]
    source = write(tmp_path / "train_x.json", made)
    for workers in (1, 3):
        preprocess([source], tmp_path / f"out{workers}", workers=workers)
    assert snapshot(tmp_path / "out1") == snapshot(tmp_path / "out3")
    assert clips_of(tmp_path / "out1")["clip"].to_list() == list(range(698))
    parts = [pq.ParquetFile(p).metadata.num_rows for p in sorted((tmp_path / "out1/clips/split=train").iterdir())]
    assert parts == [100, 99, 100, 99, 100, 100, 100]


def test_parts_and_row_groups_hold_the_same_clips(tmp_path):
    source = write(tmp_path / "train_x.json", many())
    preprocess([source], tmp_path / "out")
    table, rows = (pq.ParquetFile(tmp_path / f"out/{t}/split=train/part-00000.parquet") for t in ("frames", "clips"))
    sizes = [rows.metadata.row_group(i).num_rows for i in range(rows.num_row_groups)]
    assert sizes == [256, 256, 188]
    for i in range(rows.num_row_groups):
        mine = table.read_row_group(i, columns=["clip"])["clip"].unique().to_pylist()
        assert mine == rows.read_row_group(i, columns=["clip"])["clip"].to_pylist()


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
    (tmp_path / "out/frames").mkdir(parents=True)
    video = tmp_path / "out/frames/video.arrow"
    video.touch()
    with pytest.raises(InputError, match="is no shard"):
        run(tmp_path, [clip()])
    assert video.exists()


DIES = """
import os, sys
from pathlib import Path
from pipeline import preprocess as p, output as shards
sync = shards.sync
shards.sync = lambda path: os._exit(9) if path == Path(sys.argv[2]) else sync(path)
p.preprocess([Path(sys.argv[1])], Path(sys.argv[2]))
"""


def test_killed_between_the_renames_the_next_run_does_the_work(tmp_path):
    run(tmp_path, [clip()])
    source = write(tmp_path / "train_training.json", [clip(), clip("b")])
    out = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", DIES, source, out]).returncode == 9
    assert not (out / "manifest.json").exists()  # neither old nor new claims to be complete
    preprocess([source], out)
    assert shards.verify(out)
    assert len(clips_of(out)) == 2


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", range(6))
def test_a_commit_that_fails_midway_brings_the_old_output_back(tmp_path, monkeypatch, step, error):
    run(tmp_path, [clip()])
    before = snapshot(tmp_path / "out")
    rename, count = Path.rename, iter(range(100))

    def failing(self, target):
        if next(count) == step:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((InputError, KeyboardInterrupt)):
        run(tmp_path, [clip(), clip("b")])
    monkeypatch.undo()
    assert snapshot(tmp_path / "out") == before
    assert shards.verify(tmp_path / "out")


def test_a_lost_quarantine_file_is_noticed(tmp_path):
    source = write(tmp_path / "train_x.json", [clip(), {"video_uid": "broken"}])
    preprocess([source], tmp_path / "out")
    (tmp_path / "out/quarantine.jsonl").unlink()
    assert preprocess([source], tmp_path / "out")[1] is False
    assert (tmp_path / "out/quarantine.jsonl").exists()


def test_frames_on_disk_are_held_against_the_annotations(tmp_path):
    root = tmp_path / "frames"
    root.mkdir()
    write_frames(root / "video-short.arrow", np.zeros((15, 8, 8, 3), np.uint8))
    write_frames(root / "video-long.arrow", np.zeros((25, 8, 8, 3), np.uint8))
    table = pa.table({"frame": ["x"] * 12})
    with pa.OSFile(str(root / "video-file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    (root / "video-bad.arrow").write_bytes(b"no arrow")
    manifest = run(tmp_path, [clip(n) for n in ("short", "long", "file", "bad")], frames_root=str(root), pad_s=2)
    told = {h["name"]: h["text"] for h in manifest["hazards"] if "frames" in h["name"] or "annot" in h["name"]}
    assert set(told) == {"annotations longer than the frames", "frames unreadable"}
    assert "video-short (annotated to 20, has 15)" in told["annotations longer than the frames"]
    assert "video-file (annotated to 20, has 12)" in told["annotations longer than the frames"]
    assert clips_of(tmp_path / "out")["end_frame"].to_list() == [20, 24, 20, 24]  # padding ends with the frames


# ---- usage -------------------------------------------------------------------------------------------


def test_a_name_that_tells_no_split_is_bad_usage(tmp_path, capsys):
    (tmp_path / "clips").mkdir()  # pytest's own folder has the token test in its name
    source = write(tmp_path / "clips/trainer.json", [clip()])
    assert main(["preprocess", str(source), "--out", str(tmp_path / "out")]) == 2
    assert "--split" in capsys.readouterr().err
    assert main(["preprocess", str(source), "--out", str(tmp_path / "out"), "--split", "dev"]) == 0
    assert clips_of(tmp_path / "out", "dev")["neg_rate"].to_list() == [1.0]


def test_the_pipeline_runs_where_torch_is_not_installed(tmp_path):
    source = write(tmp_path / "train_x.json", [clip()])
    code = (
        "import sys; sys.modules['torch'] = None; from trainer.cli import main;"
        f"sys.exit(main(['preprocess', {str(source)!r}, '--out', {str(tmp_path / 'out')!r}])"
        f" or main(['inspect', {str(tmp_path / 'out')!r}]))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0

"""`evaluate`: what it writes, that its metrics follow from what it wrote, and that no digit depends on how."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from small_run import clip, go, write_data

from pipeline.errors import InputError
from trainer.cli import main
from trainer.evaluate import evaluate
from trainer.evaluation.evaluate_scores import evaluate_scores, evaluate_submission

MODES = ("teacher-forced", "self-fed")


@pytest.fixture(scope="module")
def data(splits):
    return splits


@pytest.fixture(scope="module")
def run(splits_run):
    return splits_run


@pytest.fixture(scope="module")
def found(run, data):
    torch.set_num_threads(1)
    return evaluate(run, data)


def metrics_alone(metrics):
    return {mode: metrics[mode] for mode in MODES if mode in metrics}


def test_it_writes_val_and_test_teacher_forced_and_test_self_fed(found, run):
    assert found.folder == run / "evaluation-test"
    assert {p.name for p in found.folder.iterdir()} == {"metrics.json", *(f"{m}.parquet" for m in MODES)}
    forced, live = (pq.read_table(found.folder / f"{mode}.parquet") for mode in MODES)
    frames = {split: sum(clip(i, split).num_frames for i in range(n)) for split, n in (("val", 4), ("test", 6))}
    assert {v["values"]: v["counts"] for v in forced["split"].value_counts().to_pylist()} == frames
    assert live["split"].unique().to_pylist() == ["test"]
    assert {"said", "updates"} <= set(live.column_names)
    assert found.notes == ()
    assert json.loads((found.folder / "metrics.json").read_text()) == found.metrics


@pytest.mark.parametrize("mode", MODES)
def test_all_metrics_follow_from_the_parquet_alone(found, mode):
    again = evaluate_scores(found.folder / f"{mode}.parquet")  # the file says which shards it is of
    assert again.metrics[mode] == found.metrics[mode]
    assert again.metrics["thresholds"] == found.metrics["thresholds"]


@pytest.mark.parametrize("layout", [{"group": 1, "part": 2}, {"group": 2, "part": 5}])
def test_order_and_shards_change_no_digit(found, run, tmp_path, layout):
    shuffled = write_data(
        tmp_path / "data", 7, 4, 6, lambda clips: random.Random(1).sample(clips, len(clips)), **layout
    )
    again = evaluate(run, shuffled, out=tmp_path / "out")
    assert again.metrics["data_key"] != found.metrics["data_key"]
    assert metrics_alone(again.metrics) == metrics_alone(found.metrics)


def test_thresholds_come_from_val_alone(found, run, data, tmp_path):
    """The test split's labels are others; what was chosen is not."""
    table = pq.read_table(found.folder / "teacher-forced.parquet")
    noise = pa.array(np.random.default_rng(0).normal(size=len(table)).astype(np.float32))
    is_test = pc.equal(table["split"].cast("string"), "test")
    place = table.column_names.index("speaking_logit")
    changed = table.set_column(place, "speaking_logit", pc.if_else(is_test, noise, table["speaking_logit"]))
    pq.write_table(changed.drop_columns(["speaking_probability"]), tmp_path / "noise.parquet")
    again = evaluate_scores(tmp_path / "noise.parquet", data)
    assert again.metrics["thresholds"] == found.metrics["thresholds"]
    forced = again.metrics["teacher-forced"]["speaking"]
    assert forced["frames"]["ap"] != found.metrics["teacher-forced"]["speaking"]["frames"]["ap"]


def test_without_val_nothing_is_chosen_and_it_says_so(run, data, tmp_path):
    found = evaluate(run, data, split="val", out=tmp_path / "out")
    assert found.notes == (
        "val itself is measured: no threshold could be chosen, so no events from scores",
        "not self-fed: no threshold for speaking",
    )
    report = found.metrics["teacher-forced"]["speaking"]
    assert report["frames"]["ap"] is not None
    assert report["frames"]["f1"] is None
    assert report["events"] is None
    assert "self-fed" not in found.metrics


def test_the_reference_s_updates_are_read_instead_of_its_own(found, run, data):
    told = evaluate(run, data, updates="reference")
    assert told.folder == run / "evaluation-test-true-state"
    assert told.metrics["teacher-forced"] == found.metrics["teacher-forced"]
    assert (told.metrics["updates"], found.metrics["updates"]) == ("reference", "own")
    rows = pq.read_table(told.folder / "self-fed.parquet").to_pylist()
    updates = {(row["clip_id"], row["frame"]): row["updates"] for row in rows if row["updates"] is not None}
    assert updates == {(f"test{i}", 3 + i % 5): [{"id": "S1", "transition": "complete"}] for i in range(6)}
    assert all(row["dst_update_logit"] is not None for row in rows)


def test_updates_are_its_own_or_the_reference_s_where_the_arm_reads_any(run, data, tmp_path):
    with pytest.raises(InputError, match="updates is 'mine', expected one of own, reference"):
        evaluate(run, data, updates="mine")
    go(data, tmp_path / "run", arm="speak", steps=2)
    with pytest.raises(InputError, match="its arm, speak, reads no updates; take a run of speak"):
        evaluate(tmp_path / "run", data, updates="reference")


def test_an_arm_without_a_dst_head_is_not_judged_by_one(data, tmp_path):
    go(data, tmp_path / "run", arm="speak", steps=3)
    found = evaluate(tmp_path / "run", data)
    for mode in MODES:
        assert found.metrics[mode]["dst_update"]["frames"] is None
        assert found.metrics[mode]["state"] is None
    table = pq.read_table(found.folder / "self-fed.parquet")
    assert table["dst_update_logit"].null_count == len(table)


def strangers(data, path, score, splits=("val", "test")):
    """A file as another tool would write it: numbers of clips, frames, and scores by label."""
    tables = [
        pq.read_table(data / "frames" / f"split={split}", partitioning=None).append_column(
            "split", pa.array([split] * sum(clip(i, split).num_frames for i in range({"val": 4, "test": 6}[split])))
        )
        for split in splits
    ]
    table = pa.concat_tables(tables)
    logits = [score(label == 1) for label in table["speaking_label"].to_pylist()]
    columns = {name: table[name] for name in ("split", "clip_id", "frame")}
    pq.write_table(pa.table({**columns, "speaking_logit": logits}), path)
    return path


def test_a_strangers_oracle_is_perfect(data, tmp_path, capsys):
    path = strangers(data, tmp_path / "oracle.parquet", lambda speaks: 3.0 if speaks else -3.0)
    assert main(["evaluate", str(data), "--scores", str(path), "--out", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    speaking = metrics["scores"]["speaking"]
    assert (speaking["frames"]["ap"], speaking["frames"]["f1"], speaking["events"]["f1"]) == (1.0, 1.0, 1.0)
    assert speaking["events"]["median_latency_s"] == 0.0
    assert metrics["scores"]["dst_update"]["frames"] is None
    assert "event F1" in capsys.readouterr().out


def test_a_strangers_test_scores_need_a_threshold_that_is_given(data, tmp_path, capsys):
    path = strangers(data, tmp_path / "test.parquet", lambda speaks: 1.0 if speaks else 0.0, splits=("test",))
    assert main(["evaluate", str(data), "--scores", str(path)]) == 0
    assert "no scores of val: no threshold was chosen; score it, or give one" in capsys.readouterr().out
    found = evaluate_scores(path, data, given={"speaking": 0.5})
    assert found.metrics["scores"]["speaking"]["events"]["f1"] == 1.0


def test_scores_that_name_no_shards_ask_for_them(data, tmp_path):
    path = strangers(data, tmp_path / "x.parquet", float)
    with pytest.raises(InputError, match="does not say which shards it is of; name them: evaluate DATA --scores"):
        evaluate_scores(path)


def sessions_of(clips, path):
    """EgoProactive's file of the clips: a chunk for every stretch of equal labels."""
    rows = []
    for c in clips:
        speaking = (c.labels[0] == 1).astype(int)
        edges = [0, *(np.flatnonzero(np.diff(speaking)) + 1).tolist(), c.num_frames]
        intervals = [[(c.start_frame + edge) / c.fps for edge in pair] for pair in itertools.pairwise(edges)]
        answers = ["$interrupt$text" if speaking[edge] else "$silent$" for edge in edges[:-1]]
        rows.append({"video_path": f"{c.video_uid}.mp4", "video_intervals": intervals, "answers": answers})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, sum(len(row["answers"]) for row in rows)


def test_a_run_is_measured_by_chunks_in_both_modes(found, run, data, tmp_path, capsys):
    """The submission holds the answers of the free-running pass; each file alone gives the same numbers."""
    sessions, number = sessions_of([clip(i, "test") for i in range(6)], tmp_path / "sessions.jsonl")
    submission, out = tmp_path / "submission.jsonl", tmp_path / "out"
    options = ["--chunks", str(sessions), "--submission", str(submission)]
    assert main(["evaluate", str(run), str(data), "--out", str(out), "--draws", "0", *options]) == 0
    assert "macro F1" in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    for mode in MODES:
        report = metrics[mode].pop("chunks")
        assert report["overall"]["support"] == number
        assert evaluate_scores(out / f"{mode}.parquet", chunks=sessions).metrics[mode]["chunks"] == report
    assert metrics_alone(metrics) == metrics_alone(found.metrics)
    assert evaluate_submission(submission, sessions).metrics["submission"]["chunks"] == report


def test_sessions_of_other_data_are_refused_before_anything_is_scored(run, data, tmp_path):
    sessions, _ = sessions_of([clip(i, "train") for i in range(2)], tmp_path / "sessions.jsonl")
    with pytest.raises(InputError, match="the split has no clip of video"):
        evaluate(run, data, out=tmp_path / "out", chunks=sessions)
    assert not (tmp_path / "out").exists()


def test_batch_options_change_no_metric(tmp_path):
    """Two runs with the same weights whose options name other batches (of no steps that differ: none is done)."""
    data = write_data(tmp_path / "data", clips=3, val=3)
    for name, batch in (("a", 60), ("b", 4000)):
        go(data, tmp_path / name, steps=1, clips_per_step=3, warmup_steps=0, lr=1e-30, micro_batch_tokens=batch)
    a, b = (evaluate(tmp_path / name, data, "train", live=False).metrics["teacher-forced"] for name in ("a", "b"))
    assert a["speaking"] == b["speaking"]
    assert a["dst_update"] == b["dst_update"]

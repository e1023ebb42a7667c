"""`evaluate`: what it writes, that its metrics follow from what it wrote, and that no digit depends on how."""

from __future__ import annotations

import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from small_run import clip, go, write_data

from trainer.cli import main
from trainer.evaluate import evaluate
from trainer.evaluation.metrics import evaluate_scores

MODES = ("teacher-forced", "free-running")


@pytest.fixture(scope="module")
def found(splits_run, splits):
    return evaluate(splits_run, splits)


def test_it_writes_val_and_test_teacher_forced_and_test_free_running(found, splits_run):
    assert found.folder == splits_run / "evaluation-test"
    assert {p.name for p in found.folder.iterdir()} == {"metrics.json", *(f"{m}.parquet" for m in MODES)}
    forced, live = (pq.read_table(found.folder / f"{mode}.parquet") for mode in MODES)
    frames = {split: sum(clip(i, split).num_frames for i in range(n)) for split, n in (("val", 4), ("test", 6))}
    assert {v["values"]: v["counts"] for v in forced["split"].value_counts().to_pylist()} == frames
    assert live["split"].unique().to_pylist() == ["test"]
    assert found.notes == ()
    assert json.loads((found.folder / "metrics.json").read_text()) == found.metrics


def test_given_thresholds_are_used_in_both_modes(found, splits, splits_run, tmp_path):
    out = ["--out", str(tmp_path), "--draws", "0"]
    assert main(["evaluate", str(splits_run), str(splits), "--threshold", "speaking=1e9", *out]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    updates = found.metrics["thresholds"]["event"]["dst_update"]  # the other head's stays as it was chosen
    assert metrics["thresholds"]["event"] == {"speaking": 1e9, "dst_update": updates}
    assert metrics["thresholds_from"] == "val, but speaking given"
    assert [metrics[mode]["speaking"]["events"]["predictions"] for mode in MODES] == [0, 0]
    again = evaluate_scores(tmp_path / "teacher-forced.parquet").metrics
    assert (again["thresholds_from"], again["thresholds"]) == (metrics["thresholds_from"], metrics["thresholds"])


@pytest.mark.parametrize("mode", MODES)
def test_all_metrics_follow_from_the_parquet_alone(found, mode):
    again = evaluate_scores(found.folder / f"{mode}.parquet")  # the file says which shards it is of
    assert again.metrics[mode] == found.metrics[mode]
    assert again.metrics["thresholds"] == found.metrics["thresholds"]


def test_order_and_shards_change_no_digit(found, splits_run, tmp_path):
    shuffled = write_data(tmp_path / "data", 7, 4, 6, lambda clips: random.Random(1).sample(clips, len(clips)), part=5)
    again = evaluate(splits_run, shuffled, out=tmp_path / "out")
    assert again.metrics["data_key"] != found.metrics["data_key"]
    assert [again.metrics[mode] for mode in MODES] == [found.metrics[mode] for mode in MODES]


def test_thresholds_come_from_val_alone(found, splits, tmp_path):
    """TRAPS 38. The test split's scores are noise here; what was chosen is the same."""
    table = pq.read_table(found.folder / "teacher-forced.parquet")
    noise = pa.array(np.random.default_rng(0).normal(size=len(table)).astype(np.float32))
    is_test = pc.equal(table["split"].cast("string"), "test")
    place = table.column_names.index("speaking_logit")
    changed = table.set_column(place, "speaking_logit", pc.if_else(is_test, noise, table["speaking_logit"]))
    pq.write_table(changed.drop_columns(["speaking_probability"]), tmp_path / "noise.parquet")
    again = evaluate_scores(tmp_path / "noise.parquet", splits)
    assert again.metrics["thresholds"] == found.metrics["thresholds"]
    forced = again.metrics["teacher-forced"]["speaking"]
    assert forced["frames"]["ap"] != found.metrics["teacher-forced"]["speaking"]["frames"]["ap"]


def test_without_val_nothing_is_chosen_and_it_says_so(splits_run, splits, tmp_path):
    found = evaluate(splits_run, splits, split="val", out=tmp_path / "out")
    assert found.notes == (
        "no scores of val beside those of the split: no threshold was chosen, so no events from scores; give one",
        "not evaluated free-running: no threshold for speaking",
    )
    report = found.metrics["teacher-forced"]["speaking"]
    assert report["frames"]["ap"] is not None
    assert report["events"] is None
    assert "free-running" not in found.metrics


def test_the_reference_s_updates_are_read_instead_of_its_own(found, splits_run, splits):
    told = evaluate(splits_run, splits, updates="reference")
    assert told.folder == splits_run / "evaluation-test-true-state"
    assert told.metrics["teacher-forced"] == found.metrics["teacher-forced"]
    assert (told.metrics["updates"], found.metrics["updates"]) == ("reference", "own")
    rows = pq.read_table(told.folder / "free-running.parquet").to_pylist()
    updates = {(row["clip_id"], row["frame"]): row["updates"] for row in rows if row["updates"] is not None}
    assert updates == {(f"test{i}", 3 + i % 5): [{"id": "S1", "transition": "complete"}] for i in range(6)}
    assert all(row["dst_update_logit"] is not None for row in rows)


def test_an_arm_without_a_dst_head_is_not_judged_by_one(splits, tmp_path):
    go(splits, tmp_path / "run", arm="speak", model="nano", steps=2)
    found = evaluate(tmp_path / "run", splits)
    for mode in MODES:
        assert found.metrics[mode]["dst_update"]["frames"] is None
        assert found.metrics[mode]["state"] is None
    table = pq.read_table(found.folder / "free-running.parquet")
    assert table["dst_update_logit"].null_count == len(table)


def strangers_oracle(path, **splits):
    """A file as another tool would write it: logits of 1 and -1 for clips of small_run, all frames of them."""
    clips = [(split, clip(i, split)) for split, count in splits.items() for i in range(count)]
    rows = [
        {"split": split, "clip_id": c.clip_id, "frame": frame, "speaking_logit": 1.0 if label == 1 else -1.0}
        for split, c in clips
        for frame, label in enumerate(c.labels[0].tolist())
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_a_strangers_oracle_is_perfect(splits, tmp_path, capsys):
    path = strangers_oracle(tmp_path / "oracle.parquet", val=4, test=6)
    assert main(["evaluate", str(splits), "--scores", str(path), "--out", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    speaking = metrics["scores"]["speaking"]
    assert (speaking["frames"]["ap"], speaking["frames"]["f1"], speaking["events"]["f1"]) == (1.0, 1.0, 1.0)
    assert "event F1" in capsys.readouterr().out


def test_a_strangers_test_scores_need_a_threshold_that_is_given(splits, tmp_path):
    path = strangers_oracle(tmp_path / "test.parquet", test=6)
    (note,) = evaluate_scores(path, splits).notes
    assert note.startswith("no scores of val beside those of the split: no threshold was chosen")
    found = evaluate_scores(path, splits, given={"speaking": 0.0})
    assert found.metrics["scores"]["speaking"]["events"]["f1"] == 1.0

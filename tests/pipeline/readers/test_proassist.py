"""ProAssist's files as its script prepares them: names, layout, summary clips, knowledge."""

from __future__ import annotations

from made_up import proassist, run, run_on, written


def test_an_assistant_speaks_at_the_last_frame_before_its_turn(tmp_path):
    out = run(tmp_path, [proassist()], "train.jsonl", neg_rate={"train": 1.0})
    assert out.bounds() == [(0, 16)]
    assert out.ones() == ([8, 15], [])
    assert set(out.labels()["dst_update"].values()) == {-100}
    (row,) = out.clips()
    assert (row["goal"], row["knowledge"], row["dataset"]) == ("wash a cup", "soap first", "wtag")


def test_an_update_that_is_none_is_refused(tmp_path):
    clip = proassist("cup-2")
    clip["conversation"].append({"role": "DST_UPDATE", "content": [{"id": "S1", "transition": "explode"}]})
    good = proassist()
    good["conversation"].append({"role": "DST_UPDATE", "content": [{"id": "S1", "transition": "start"}]})
    out = run(tmp_path, [good, clip], "train.jsonl")
    assert out.ones() == ([8, 15], [15])
    assert [line["turn"] for line in out.refused()] == [7]


# ---- names and layout --------------------------------------------------------------------------------

NAMES = {
    "train": "dialog-klg-sum_train_L4096_I1.jsonl",
    "val": "dialog-klg-sum_val_L4096_I1.jsonl",
    "test": "dialog-klg-sum_test_L4096_I1+SEP.jsonl",
}


def test_files_of_three_splits_go_into_one_output(tmp_path):
    paths = [written(tmp_path / name, [proassist(f"cup-{split}")]) for split, name in NAMES.items()]
    out = run_on(paths, tmp_path)
    for split in NAMES:
        assert [clip["video_uid"] for clip in out.clips(split)] == [f"cup-{split}"]
        assert out.ones(split)[0] == [8, 15]


def test_the_public_layout_is_read_where_it_was_prepared(tmp_path):
    """Of processed_data/<dataset>, prepared/ alone; what it was made from is left out with a line."""
    root = tmp_path / "processed_data"
    for dataset in ("wtag", "holoassist"):
        for split, name in NAMES.items():
            written(root / dataset / "prepared" / name, [proassist(f"{dataset}-{split}") | {"dataset": dataset}])
        for other in ("val_test_split.json", "generated_dialogs/train.json", "features/train.json"):
            written(root / dataset / other, [{}])
    out = run_on([root], tmp_path)
    assert out.refused() == []
    assert [clip["video_uid"] for clip in out.clips("train")] == ["holoassist-train", "wtag-train"]
    skipped = {"/".join(one["path"].split("/")[-2:]): one["why"] for one in out.manifest["skipped"]}
    left = [
        f"{dataset}/{what}"
        for dataset in ("wtag", "holoassist")
        for what in ("val_test_split.json", "generated_dialogs")
    ]
    assert skipped == dict.fromkeys(left, "beside prepared/, which is read instead")


def test_variants_of_one_preparation_are_all_read_and_named(tmp_path):
    """Cut for 4,096 tokens and uncut: the same conversation twice, which is a hazard."""
    names = ("dialog-klg-sum_val_L4096_I1.jsonl", "dialog-klg-sum_val_L0_I1.jsonl")
    whole = proassist()
    short = proassist() | {"conversation": proassist()["conversation"][:5], "end_frame_idx": 9}
    out = run_on([written(tmp_path / name, [clip]) for name, clip in zip(names, (short, whole), strict=True)], tmp_path)
    assert sorted(out.bounds("val")) == [(0, 9), (0, 16)]
    assert out.hazards()["conversations in several files"].startswith("1 conversations stand in several files")

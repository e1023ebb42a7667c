"""ProAssist's files as its script prepares them: names, layout, user turns, variants."""

import pytest
from made_up import proassist, run, run_on, turn, written


def test_an_assistant_speaks_at_the_last_frame_before_its_turn(tmp_path):
    with_update = proassist()
    with_update["conversation"].append(turn("DST_UPDATE", "S1 start"))
    out = run(tmp_path, [proassist("cup-3"), with_update], "train.jsonl", neg_rate={"train": 1.0})
    assert out.bounds() == [(0, 16), (0, 16)]
    assert (out.ones(), out.ones(clip=1)) == (([8, 15], []), ([8, 15], [15]))
    assert set(out.labels()["dst_update"].values()) == {-100}
    row = out.clips()[0]
    assert (row["goal"], row["knowledge"], row["dataset"]) == ("wash a cup", "soap first", "wtag")


F0, F1, F2 = ({"role": "frames", "start": 5 * i + 10, "end": 5 * i + 15} for i in range(3))
USER, REPLY = turn("user", "What now?"), turn("assistant", "Wash it.")


@pytest.mark.parametrize(
    ("turns", "heard"),
    [
        ([F0, USER, F1, F2, REPLY], [(15, 16)]),  # by the next frame, when frames follow
        ([F0, USER, F1, USER, F2], [(15, 16), (20, 21)]),
        ([F0, USER, USER, REPLY], [(14, 15), (14, 15)]),
    ],
)
def test_a_user_turn_between_frames_is_heard_once(tmp_path, turns, heard):
    (clip,) = run(tmp_path, [proassist() | {"conversation": turns, "end_frame_idx": 30}]).clips()
    assert [(t["start_frame"], t["end_frame"]) for t in clip["turns"] if t["role"] == "user"] == heard


NAMES = {
    "train": "dialog-klg-sum_train_L4096_I1.jsonl",
    "val": "dialog-klg-sum_val_L4096_I1.jsonl",
    "test": "dialog-klg-sum_test_L4096_I1+SEP.jsonl",
}


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
    for split in NAMES:
        assert [clip["video_uid"] for clip in out.clips(split)] == [f"holoassist-{split}", f"wtag-{split}"]
    skipped = {"/".join(one["path"].split("/")[-2:]): one["why"] for one in out.manifest["skipped"]}
    others = ("val_test_split.json", "generated_dialogs")
    left = [f"{dataset}/{what}" for dataset in ("wtag", "holoassist") for what in others]
    assert skipped == dict.fromkeys(left, "beside prepared/, which is read instead")


def test_variants_of_one_preparation_are_all_read_and_named(tmp_path):
    """Cut for 4,096 tokens and uncut: the same conversation twice, which is a hazard."""
    whole = written(tmp_path / "dialog-klg-sum_val_L0_I1.jsonl", [proassist()])
    short = proassist() | {"conversation": proassist()["conversation"][:5], "end_frame_idx": 9}
    out = run_on([written(tmp_path / NAMES["val"], [short]), whole], tmp_path)
    assert sorted(out.bounds("val")) == [(0, 9), (0, 16)]
    assert out.hazards()["conversations in several files"].startswith("1 conversations stand in several files")

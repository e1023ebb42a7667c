"""The summary table, and the numbers of a split: every number below was counted by eye."""

import pytest
from toy_folder import counts_of, make_clip, text_of, toy_splits

from pipeline import hazards, summary
from pipeline.summary import Head


def splits(**clips):
    return summary.splits_of({"splits": {name: counts_of(those) for name, those in clips.items()}})


def test_counts_of_hand_labelled_clips():
    train, val = splits(**toy_splits())
    assert (train.name, train.clips, train.recordings, train.frames, train.first) == ("train", 2, 2, 18, 1)
    assert train.hours == pytest.approx(9 / 3600)
    cells = (train.speak_only, train.dst_only, train.both, train.silence, train.not_sampled)
    assert cells == (4, 0, 2, 7, 5)
    assert train.supervised == pytest.approx(13 / 18)
    assert train.heads["speaking"] == Head(positives=6, frames=18, supervised=13, clips=2, gaps={2.0: 1})
    assert train.heads["dst_update"].frames == 10  # a clip without steps says nothing about that head
    assert (val.speak_only, val.dst_only, val.both, val.silence, val.not_sampled) == (1, 2, 0, 3, 0)


@pytest.mark.parametrize(
    ("gaps", "median", "usual"),
    [
        ({}, None, (0.0, 0, 0)),
        ({1.0: 1, 9.0: 1}, 1.0, (1.0, 1, 2)),
        ({1.0: 1, 2.0: 5}, 2.0, (2.0, 5, 6)),
    ],
)
def test_gaps_between_events(gaps, median, usual):
    head = Head(1, 1, 1, 1, gaps)
    assert (head.median_gap, head.usual_gap) == (median, usual)


def test_hazards_of_label_counts():
    train, val = splits(**toy_splits())
    (positive,) = splits(train=[make_clip("a", "0111", "...."), make_clip("b", "0111", "....")])
    (periodic,) = splits(train=[make_clip("a", "1000", "0001", steps=[("S1", "one")])])
    periodic.heads["speaking"].gaps.update({2.0: 17, 1.0: 3})
    told = [
        [(name, where, text.partition(":")[0]) for name, where, text in hazards.of_labels(split)]
        for split in (train, val, positive, periodic)
    ]
    assert told == [
        [("heads coincide", "train", "2 of 2 DST frames are positive for both heads")],
        [("events at the first frame", "val", "1 of 1 clips begin on an event")],
        [
            ("implausible positive rate", "train", "75.0% of frames are positive for speaking"),
            ("head without positives", "train", "no clip says anything about DST"),
        ],
        [
            ("events at a fixed period", "train", "17 of 20 gaps between speaking events last 2 s"),
            ("events at the first frame", "train", "1 of 1 clips begin on an event"),
        ],
    ]


def test_summary_table_fits_100_columns_and_names_drops_and_hazards():
    counts = {name: counts_of(clips) for name, clips in toy_splits().items()}
    counts["train"]["drops"] = {"outside the clip": 1, "empty range": 0}
    source = {"path": "/x/train_t.json", "split": "train", "clips": 2, "frame_convention": "event", "quarantined": 1}
    hazard = {"name": "frames missing", "split": "train", "text": "3 videos are shorter than their annotations"}
    text = text_of(summary.render_summary({"splits": counts, "hazards": [hazard], "inputs": [source]}))
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 100
    assert any(line.split() == ["supervised", "frames", "72.2%", "100.0%"] for line in lines)
    assert any(line.split() == ["dropped:", "outside", "the", "clip", "1", "-"] for line in lines)
    assert "empty range" not in text
    assert "train_t.json: 2 train clips, event convention, 1 quarantined" in lines
    assert "hazard [train] 3 videos are shorter than their annotations" in lines

"""The summary table, and the numbers of a split: every number below was counted by eye."""

import pytest
from made_up import text_of

from pipeline import summary
from pipeline.summary import Head


def test_counts_of_hand_labelled_clips(toy):
    train, val = summary.splits_of(toy.manifest)
    assert (train.name, train.clips, train.recordings, train.frames, train.first) == ("train", 2, 2, 18, 1)
    assert train.hours == pytest.approx(9 / 3600)
    cells = (train.speak_only, train.dst_only, train.both, train.silence, train.not_sampled)
    assert cells == (2, 1, 1, 13, 1)
    assert train.heads["speaking"] == Head(positives=3, frames=18, supervised=15, clips=2, gaps={2.5: 1})
    # a clip without steps says nothing about the second head
    assert train.heads["dst_update"] == Head(positives=2, frames=10, supervised=10, clips=1, gaps={3.0: 1})
    assert (val.speak_only, val.dst_only, val.both, val.silence, val.not_sampled) == (1, 1, 0, 4, 0)


def test_summary_table_fits_100_columns_and_names_drops_and_hazards(toy):
    hazard = {"name": "frames missing", "split": "train", "text": "3 videos are shorter than their annotations"}
    text = text_of(summary.render_summary(toy.manifest | {"hazards": [hazard]}))
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 100
    assert any(line.split() == ["supervised", "frames", "94.4%", "100.0%"] for line in lines)
    assert any(line.split() == ["dropped:", "outside", "the", "clip", "1", "-"] for line in lines)
    assert "train_toy.json: 2 train clips of prospect, event convention" in lines
    assert "hazard [train] 3 videos are shorter than their annotations" in lines

"""The summary table, and the numbers of a split: every number below was counted by eye."""

import pytest
from made_up import text_of

from pipeline import summary


def test_counts_of_hand_labelled_clips(toy):
    train = toy.manifest["splits"]["train"]
    names = ("clips", "recordings", "frames", "hours", "supervised", "both_positive", "first_frame_positive")
    assert [train[name] for name in names] == [2, 2, 18, pytest.approx(9 / 3600), 17, 1, 1]
    names = ("positive", "frames", "supervised", "clips", "gaps")
    assert [train[f"speaking_{name}"] for name in names] == [3, 18, 15, 2, [(2.5, 1)]]
    # a clip without steps says nothing about the second head
    assert [train[f"dst_update_{name}"] for name in names] == [2, 10, 10, 1, [(3.0, 1)]]


def test_summary_table_fits_100_columns_and_names_drops_and_hazards(toy):
    hazard = {"name": "frames missing", "split": "train", "text": "3 videos are shorter than their annotations"}
    text = text_of(summary.render_summary(toy.manifest | {"hazards": [hazard]}))
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 100
    assert any(line.split() == ["supervised", "frames", "94.4%", "100.0%"] for line in lines)
    assert any(line.split() == ["dropped:", "outside", "the", "clip", "1", "-"] for line in lines)
    assert "train_toy.json: 2 train clips of prospect, event convention" in lines
    assert "hazard [train] 3 videos are shorter than their annotations" in lines

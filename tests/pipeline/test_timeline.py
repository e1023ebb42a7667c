"""One clip in the terminal."""

import pytest
from made_up import run, tea, text_of, turn

from pipeline import timeline
from pipeline.dataset import Split


@pytest.mark.parametrize(
    ("asked", "found"),
    [("toy_a#0", "toy_a#0"), ("b#", "toy_b#1"), ("1", "toy_b#1"), ("val:0", "toy_c#0"), ("toy_c", "toy_c#0")],
)
def test_clip_by_id_number_part_or_split(toy, asked, found):
    assert timeline.find_clip(toy.folder, asked)[1].clip_id == found


def test_updates_count_in_the_order_of_time(tmp_path):
    done, begun = (turn("DST_UPDATE", f"K1 {word}", at / 2, at, at + 1) for word, at in (("complete", 8), ("start", 2)))
    [clip] = Split(run(tmp_path, [tea([done, begun], 0, 9)]).folder, "train").in_order()
    assert [state["K1"] for state in timeline.states_of(clip)[2:]] == ["completed", "in_progress"]


def test_timeline_shows_labels_and_turns_with_the_state_they_lead_to(toy):
    text = text_of(timeline.Timeline(*timeline.find_clip(toy.folder, "toy_a#0")))
    lines = [line.rstrip() for line in text.splitlines()]
    at = lines.index("frame    ╷193 1:36.5")
    assert lines[at + 1 : at + 4] == [
        "turn     2-4   5",  # 6 begins one frame later and has no room
        "speaking █·────█·──",
        "DST      █──────█──",
    ]
    assert any(line.startswith("frames    193..203, 10 at 2 fps, 1:36.5 to 1:41.5") for line in lines)
    wanted = [
        "1:36.5  193..195  user        I want to build it.",
        "S1→start",
        "state: in progress S1 | not started S2 S3",
        "Great, take the base.",
        "S1→complete, S2→start",
        "state: completed S1 | in progress S2 | not started S3",
        "Too late.",
        "(outside the clip: labels nothing)",
    ]
    places = [text.index(piece) for piece in wanted]
    assert places == sorted(places)
    assert {"\x1b", "\u202e"}.isdisjoint(text)  # nothing in the data is obeyed
    assert "<b>&amp; \ufffd[2J" in text  # shown as it is, and not as markup of rich's

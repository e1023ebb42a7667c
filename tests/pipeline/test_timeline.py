"""One clip in the terminal."""

import pytest
from toy_folder import make_clip, text_of, write_folder

from pipeline import terminal, timeline
from pipeline.errors import InputError


@pytest.mark.parametrize(
    ("asked", "found"),
    [("toy_a#0", "toy_a#0"), ("b#", "toy_b#1"), ("1", "toy_b#1"), ("val:0", "toy_c#0"), ("toy_c", "toy_c#0")],
)
def test_clip_by_id_number_part_or_split(toy, asked, found):
    assert timeline.find_clip(toy, asked).row["clip_id"] == found


@pytest.mark.parametrize("asked", ["toy", "0", "nowhere", "val:toy_a", "", ".*"])
def test_an_unclear_clip_lists_candidates(toy, asked):
    with pytest.raises(InputError, match=r"(train|val):toy_[abc]#"):
        timeline.Timeline(timeline.find_clip(toy, asked))


def test_timeline_reads_without_colour(toy):
    lines = [line.rstrip() for line in text_of(timeline.Timeline(timeline.find_clip(toy, "toy_a#0"))).splitlines()]
    at = lines.index("frame    ╷193 1:36.5")
    assert lines[at + 1 : at + 4] == [
        "turn     2-4   6",  # 5 begins one frame later and has no room
        "speaking ██··──██·─",
        "DST      █─··───█·─",
    ]
    assert any(line.startswith("frames    193..203, 10 at 2 fps, 1:36.5 to 1:41.5") for line in lines)


def test_timeline_lists_turns_in_order_with_the_state_they_lead_to(toy):
    text = text_of(timeline.Timeline(timeline.find_clip(toy, "toy_a#0")))
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


def test_long_clips_wrap_and_very_long_ones_are_condensed(tmp_path):
    clips = [make_clip("c1200", "0" * 1199 + "1", "." * 1200), make_clip("c9000", "0" * 8999 + "1", "." * 9000)]
    folder = write_folder(tmp_path, {"train": clips})
    long, longer = (text_of(timeline.Timeline(timeline.find_clip(folder, name))) for name in ("c1200", "c9000"))
    assert long.count("speaking ") == 15  # wrapped rows of 80
    assert "one column" not in long
    assert "one column = 6 frames, the strongest label shown" in longer
    assert longer.count("speaking ") == 19
    assert longer.count("█") == 1 + 1  # the one positive frame is still seen; and the legend


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (96.5, "1:36.5"), (59.96, "1:00"), (3600, "1:00:00"), (3723.4, "1:02:03.4")]
)
def test_clock(seconds, text):
    assert terminal.clock(seconds) == text

"""The outputs of a stream, from frames written out by hand: log, JSON lines, page."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from pipeline.errors import InputError
from trainer.live.stream import StreamFrame, StreamInfo, html_page, terminal_log

HOSTILE = "</script><script>alert(1)</script><!-- {{DATA}} \x1b[2J \u202e"
SHOWN = "</script><script>alert(1)</script><!-- {{DATA}} \ufffd[2J \ufffd"
PICTURE = Image.new("RGB", (64, 36), "#ff0000")
STEPS = [("S1", "Attach the wheels"), ("S2", "Fix the roof")]
HEADS = ("speaking", "dst_update")
INFO = StreamInfo("truck.mp4", "runs/a", "speak+dst", 2.0, HEADS, SHOWN, STEPS, [0.2, 0.2])


def frame(number: int, speak=0.1, dst=0.1, state=("not_started", "not_started"), **more) -> StreamFrame:
    """A silent frame at 2 frames/s."""
    fields = {
        "frame": number, "time_s": number / 2, "logits": dict.fromkeys(HEADS, 0.5),
        "probabilities": {"speaking": speak, "dst_update": dst}, "user_texts": (), "updates": None, "dst_text": None,
        "assistant_text": None, "tokens": 100 + number, "started_over": False, "skipped": 0, "seconds": 0.01,
        "state": dict(zip(("S1", "S2"), state, strict=True)),
    }  # fmt: skip
    return StreamFrame(**fields | more)


GOING = ("in_progress", "not_started")
DONE = (("S1", "complete"), ("S2", "pause"))
SCRIPT = [
    frame(0),
    frame(1, user_texts=("and now?",)),
    frame(2, 0.9, 0.4, GOING, updates=(("S1", "start"),), dst_text="S1->start", assistant_text="Take the wheels."),
    frame(3, 0.1, 0.6, GOING, updates=(("S9", "start"),), dst_text="S9->start"),
    frame(7, 0.3, 0.1, GOING, skipped=3, started_over=True, assistant_text=""),
    frame(8, 0.1, 0.5, ("completed", "paused"), updates=DONE, dst_text="...", user_texts=(HOSTILE,)),
]


def record(sink, frames=SCRIPT) -> None:
    with sink as show:
        for one in frames:
            show(one, PICTURE)


def test_the_log_has_a_line_per_event_in_order_and_none_that_controls_the_terminal():
    file = StringIO()
    record(terminal_log(Console(file=file, width=40), INFO))
    assert file.getvalue().splitlines() == [
        "truck.mp4: speak+dst of runs/a, 2 frames/s",
        "   0:00.5  user     and now?",
        "   0:01.0  state    S1 start  [>] S1 [ ] S2",
        "   0:01.0  says     Take the wheels.",
        "   0:01.5  state    fired, but changes nothing: S9->start",
        "   0:03.5  lost     3 frames that came too fast",
        "   0:03.5  context  full; the prompt was rebuilt with the state",
        "   0:03.5  says     (nothing)",
        f"   0:04.0  user     {SHOWN}",
        "   0:04.0  state    S1 complete, S2 pause  [x] S1 [-] S2",
        "6 frames (0:04.5); 3 skipped; spoke 2 times; 3 state changes; context rebuilt 1 time; "
        "median 10 ms a frame, p99 10 ms",
    ]


def page_data(path: Path):
    """What the page's JSON holds; text of the data opens no tag of its own."""
    scripts = re.findall("<script.*?>(.*?)</script>", path.read_text(), re.DOTALL)
    assert len(scripts) == 2
    return json.loads(next(text for text in scripts if text.startswith("{")), parse_constant=pytest.fail)


def test_the_page_holds_every_frame_and_its_events_and_text_stays_text(tmp_path):
    record(html_page(tmp_path / "new" / "x.html", INFO))
    data = page_data(tmp_path / "new" / "x.html")
    assert data["about"]["thresholds"] == [0.2, 0.2]
    assert data["about"]["steps"] == [["S1", "Attach the wheels"], ["S2", "Fix the roof"]]
    start = {"S1": "not_started", "S2": "not_started"}
    rows = data["frames"]  # frames since the one before, tokens, ms, both probabilities in 1/10,000, what happened
    assert rows[0] == [1, 100, 10.0, 1000, 1000, {"state": start}]
    assert rows[1] == [1, 101, 10.0, 1000, 1000, {"events": [["user", "and now?", ""]], "changes": 0, "lost": 0}]
    assert rows[2][5]["events"] == [["state", "S1 start", "[>] S1 [ ] S2"], ["says", "Take the wheels.", ""]]
    assert rows[2][5]["state"] == start | {"S1": "in_progress"}
    assert rows[4][:3] == [4, 107, 10.0]
    assert (rows[4][5]["lost"], rows[5][5]["changes"]) == (3, 2)
    assert rows[5][5]["events"][0] == ["user", SHOWN, ""]
    assert sorted(map(int, data["pictures"])) == [0, 1, 2, 3, 7, 8]
    with pytest.raises(InputError, match="is a folder; --html wants the name of a file"):
        record(html_page(tmp_path / "new", INFO))

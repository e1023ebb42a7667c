"""What is seen of a stream, from a script of moments written out by hand: log, screen, JSON lines, page."""

import json
import math
import re
from html.parser import HTMLParser
from io import StringIO

import pytest
from PIL import Image
from rich.console import Console

from pipeline.errors import InputError
from trainer.live import html_sink as stream_html
from trainer.live import sinks as recording

STEPS = [("S1", "Attach the wheels"), ("S2", "Fix the roof")]
BOTH = ["speaking", "dst_update"]
HOSTILE = "</script><script>alert(1)</script><!-- {{DATA}} \x1b[2J \u202e \ud800"


def about(heads=BOTH, **more):
    said = {
        "video": "truck.mp4",
        "run": "runs/a",
        "arm": "speak+dst",
        "fps": 2.0,
        "heads": heads,
        "thresholds": dict.fromkeys(heads, 0.0),
        "threshold_probabilities": dict.fromkeys(heads, 0.2),
        "steps": STEPS if "dst_update" in heads else [],
        "goal": None,
    }
    return said | more


def moment(frame, speak=0.1, dst=0.1, state=("not_started", "not_started"), **more):
    """A silent moment of a stream of 2 frames/s; `dst=None`: of an arm without that head, and without state."""
    p = {"speaking": speak} if dst is None else {"speaking": speak, "dst_update": dst}
    said = {
        "frame": frame,
        "time_s": frame / 2,
        "logits": dict.fromkeys(p, 0.5),
        "probabilities": p,
        "heard": (),
        "updates": None,
        "dst_text": None,
        "said": None,
        "state": {} if dst is None else dict(zip(("S1", "S2"), state, strict=True)),
        "tokens": 100 + frame,
        "started_over": False,
        "skipped": 0,
        "seconds": 0.01,
    }
    return said | more


GOING = ("in_progress", "not_started")
SCRIPT = [
    moment(0),
    moment(1, heard=("and now?",)),
    moment(2, 0.9, 0.4, GOING, updates=(("S1", "start"),), dst_text="S1->start", said="Take the wheels."),
    moment(3, 0.1, 0.6, GOING, updates=(), dst_text="S9->begin"),
    moment(7, 0.3, 0.1, GOING, skipped=3, started_over=True, said=""),
    moment(8, 0.1, 0.5, ("completed", "paused"), updates=(("S1", "complete"), ("S2", "pause")), dst_text="..."),
]
PICTURE = Image.new("RGB", (64, 36), "#ff0000")


def record(sink, moments=SCRIPT, picture=PICTURE):
    with sink:
        for m in moments:
            sink.show(m, picture)


def broken_off(moments, look):
    """The moments, then a look at what there is, then Ctrl-C."""
    yield from moments
    look()
    raise KeyboardInterrupt


# ---- the log -----------------------------------------------------------------------------------------


def log(moments=SCRIPT, **more):
    file = StringIO()
    record(recording.terminal(Console(file=file, width=40), about(**more)), moments)
    return file.getvalue().splitlines()


def test_a_log_has_a_line_per_event_in_the_order_of_the_stream_and_no_line_per_frame():
    assert log() == [
        "truck.mp4: speak+dst of runs/a, 2 frames/s",
        "   0:00.5  user     and now?",
        "   0:01.0  state    S1 start  [>] S1 [ ] S2",
        "   0:01.0  says     Take the wheels.",
        "   0:01.5  state    fired, but changes nothing: S9->begin",
        "   0:03.5  lost     3 frames that came too fast",
        "   0:03.5  context  full; the prompt was rebuilt with the state",
        "   0:03.5  says     (nothing)",
        "   0:04.0  state    S1 complete, S2 pause  [x] S1 [-] S2",
        "6 frames (0:04.5); 3 skipped; spoke 2 times; 3 state changes; context rebuilt 1 time; "
        "median 10 ms a frame, p99 10 ms",
    ]


def test_an_arm_without_state_tells_none():
    lines = log([moment(0, dst=None, started_over=True), moment(1, 0.9, None, said="Stop.")], heads=["speaking"])
    assert lines[1:] == [
        "   0:00.0  context  full; the prompt was rebuilt",
        "   0:00.5  says     Stop.",
        "2 frames (0:01); spoke 1 time; context rebuilt 1 time; median 10 ms a frame, p99 10 ms",
    ]


def test_a_head_that_fires_for_an_arm_without_its_text_is_told():
    assert log([moment(0, updates=())])[1] == "   0:00.0  state    fired, without a text"


def test_text_cannot_speak_to_the_terminal():
    lines = log([moment(0, heard=("a\x1b[2Jb\nc",), said="\u202edrow")], video="x\x1b]0;t\x07")
    assert lines[0].startswith("x\ufffd]0;t\ufffd: ")
    assert lines[1:3] == ["   0:00.0  user     a\ufffd[2Jb c", "   0:00.0  says     \ufffddrow"]


def test_of_many_steps_those_under_way_are_named():
    state = {f"S{i}": "completed" if i < 4 else "not_started" for i in range(20)} | {"S4": "in_progress"}
    assert recording.state_marks(state) == "4 of 20 done [>] S4"


# ---- JSON lines --------------------------------------------------------------------------------------


def test_json_lines_hold_every_field_and_are_there_at_once():
    file = StringIO()
    file.flush = lambda: seen.append(file.getvalue().count("\n"))
    seen = []
    sink = recording.json_lines(file)
    record(sink, [moment(0), moment(1, math.nan, math.inf, heard=("ü\n" + HOSTILE,), updates=(("S1", "start"),))])
    assert seen[:2] == [1, 2]
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in file.getvalue().splitlines())
    assert first == json.loads(json.dumps(moment(0)))
    assert second["probabilities"] == {"speaking": None, "dst_update": None}
    assert second["heard"] == ["ü\n" + HOSTILE]
    assert second["updates"] == [["S1", "start"]]
    assert file.getvalue().isascii()


# ---- the page ----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What of a page a browser would run or load, and the text of each element with an id or a policy."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.policy, self.open = [], {}, "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.open = attributes.get("id", tag)
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]

    def handle_data(self, text):
        self.texts[self.open] = self.texts.get(self.open, "") + text


def page(path):
    read = Page(path.read_text())
    return read, json.loads(read.texts["data"], parse_constant=pytest.fail)


def test_the_page_holds_every_moment_and_what_happened_at_it(tmp_path):
    record(recording.html(tmp_path / "new" / "x.html", about()))
    _, data = page(tmp_path / "new" / "x.html")
    assert data["about"]["thresholds"] == [0.2, 0.2]
    assert data["about"]["steps"] == [["S1", "Attach the wheels"], ["S2", "Fix the roof"]]
    start = {"S1": "not_started", "S2": "not_started"}
    assert data["moments"] == [  # frames since the one before, tokens, ms, both probabilities in 1/10,000, the rest
        [1, 100, 10.0, 1000, 1000, {"s": start}],
        [1, 101, 10.0, 1000, 1000, {"u": ["and now?"]}],
        [1, 102, 10.0, 9000, 4000,
         {"c": [["S1", "start"]], "d": "S1->start", "a": "Take the wheels.", "s": start | {"S1": "in_progress"}}],
        [1, 103, 10.0, 1000, 6000, {"c": [], "d": "S9->begin"}],
        [4, 107, 10.0, 3000, 1000, {"a": "", "x": 1, "l": 3}],
        [1, 108, 10.0, 1000, 5000,
         {"c": [["S1", "complete"], ["S2", "pause"]], "d": "...", "s": {"S1": "completed", "S2": "paused"}}],
    ]  # fmt: skip
    assert sorted(map(int, data["pictures"])) == [0, 1, 2, 3, 7, 8]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["x.html"]


def test_the_page_runs_its_own_script_alone_and_text_stays_text(tmp_path):
    hostile = moment(0, heard=(HOSTILE,), said=HOSTILE, updates=((HOSTILE, HOSTILE),), state=(HOSTILE, HOSTILE))
    names = about(video=HOSTILE, run=HOSTILE, goal=HOSTILE, steps=[(HOSTILE, HOSTILE)])
    record(recording.html(tmp_path / "x.html", names), [hostile])
    read, data = page(tmp_path / "x.html")
    assert read.tags.count("script") == 2
    assert re.fullmatch(
        r"default-src 'none'; script-src 'sha256-\S+'; style-src 'sha256-\S+'; img-src data:", read.policy
    )
    assert data["moments"][0][5]["a"] == HOSTILE.replace("\x1b", "\ufffd").replace("\u202e", "\ufffd").replace(
        "\ud800", "\ufffd"
    )
    assert "http:" not in re.sub(
        r"http://www.w3.org/2000/svg", "", (tmp_path / "x.html").read_text()
    )  # no address but SVG's name


def test_a_number_that_is_none_and_a_head_that_is_none_leave_the_page_whole(tmp_path):
    record(recording.html(tmp_path / "x.html", about(["speaking"])), [moment(0, math.nan, None, seconds=math.inf)])
    _, data = page(tmp_path / "x.html")
    assert data["moments"] == [[1, 100, None, None]]


@pytest.mark.parametrize("kind", ["html"])
def test_a_recording_is_whole_up_to_where_the_stream_broke_off(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    sink = getattr(recording, kind)(path, about())
    there = []
    with pytest.raises(KeyboardInterrupt):
        record(sink, broken_off(SCRIPT[:2], lambda: there.append(path.exists())))
    assert there == [False]
    assert len(page(path)[1]["moments"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_moment_cut_short_by_ctrl_c_is_left_out_of_the_page(tmp_path):
    sink = recording.html(tmp_path / "x.html", about())
    with sink:
        sink.show(moment(0), PICTURE)
        sink.spool.write(b"[1,101,10.0,10")
    assert len(page(tmp_path / "x.html")[1]["moments"]) == 1


@pytest.mark.parametrize("kind", ["html"])
def test_a_stream_without_a_moment_leaves_what_was_there(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    path.write_text("old")
    with pytest.raises(ValueError, match="no frame"), getattr(recording, kind)(path, about()):
        raise ValueError("no frame")
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", ["html"])
def test_a_name_that_cannot_be_a_file_is_refused_in_one_line(tmp_path, kind):
    (tmp_path / "file").touch()
    for path, found in ((tmp_path, "is a folder"), (tmp_path / "file" / "x", "is no folder")):
        with pytest.raises(InputError, match=found) as error:
            getattr(recording, kind)(path, about())
        assert f"--{kind}" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["html"])
def test_a_full_disk_is_an_error_that_names_the_recording_and_leaves_the_old_one(tmp_path, kind, monkeypatch):
    path = tmp_path / f"x.{kind}"
    path.write_text("old")
    sink = getattr(recording, kind)(path, about())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sink, "_page", full)
    with pytest.raises(OSError, match="No space") as error:
        record(sink)
    assert error.value.filename == str(path)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_pictures_are_thinned_evenly_to_their_budget():
    pictures = stream_html.Pictures(20_000)
    size = len(stream_html._jpeg(PICTURE))
    for frame in range(0, 2000, 2):
        pictures.offer(frame, PICTURE)
    kept = list(pictures.kept)
    assert 10_000 - size < size * len(kept) <= 20_000
    assert kept == list(range(0, 2000, 2 * pictures.stride))

"""What is seen of a stream, from a script of moments written out by hand: log, screen, JSON lines, page, video."""

import json
import math
import re
from html.parser import HTMLParser
from io import StringIO

import av
import pytest
from PIL import Image, ImageColor
from rich.console import Console

from pipeline.errors import InputError
from trainer.live import html_sink as stream_html
from trainer.live import sinks as recording
from trainer.live import video_sink as stream_video
from trainer.live.terminal_sink import Tally

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


def test_latencies_come_from_bins_one_percent_wide():
    tally = Tally()
    for i in range(1, 10_001):  # 0.1 ms .. 1 s
        tally.add(moment(i, seconds=i / 10_000), 2.0)
    assert tally.latency_s(0.5) == pytest.approx(0.5, rel=0.006)
    assert tally.latency_s(0.99) == pytest.approx(0.99, rel=0.006)
    assert tally.latency_s(0.0001) == pytest.approx(0.0001, rel=0.006)
    assert len(tally.bins) < 1000


# ---- the screen --------------------------------------------------------------------------------------


class Screen(StringIO):
    """As much of a terminal as the panel needs: a scroll region, a cursor to save, rows to clear."""

    def __init__(self, width, height):
        super().__init__()
        self.height, self.rows, self.gone = height, [" " * width] * height, []
        self.width, self.x, self.y, self.bottom, self.saved, self.hidden = width, 0, 0, height - 1, (0, 0), False

    def isatty(self):
        return True

    def write(self, text):
        for code, char in re.findall(r"(\x1b(?:[78]|\[[?\d;]*[A-Za-z]))|(.|\n)", text):
            self.obey(code) if code else self.put(char)
        return len(text)

    def put(self, char):
        if char == "\n":
            self.x = 0
            if self.y == self.bottom:
                self.gone.append(self.rows.pop(0))
                self.rows.insert(self.bottom, " " * self.width)
            self.y = min(self.y + (self.y != self.bottom), self.height - 1)
            return
        assert self.x < self.width, "wrote past the right edge"
        row = self.rows[self.y]
        self.rows[self.y] = row[: self.x] + char + row[self.x + 1 :]
        self.x += 1

    def obey(self, code):
        numbers, what = [int(n) for n in re.findall(r"\d+", code)], code[-1]
        if code == "\x1b7":
            self.saved = self.x, self.y
        elif code == "\x1b8":
            self.x, self.y = self.saved
        elif what == "H":
            self.x, self.y = numbers[1] - 1, numbers[0] - 1
        elif what == "r":
            self.x, self.y, self.bottom = 0, 0, (numbers[1] if numbers else self.height) - 1
        elif what == "K":
            self.rows[self.y] = " " * self.width
        elif what == "J":
            self.rows[self.y :] = [" " * self.width] * (self.height - self.y)
        elif what in "hl":
            self.hidden = what == "l"
        else:
            assert what == "m", code

    @property
    def seen(self):
        return [row.rstrip() for row in self.rows]


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setattr("trainer.live.terminal_sink._REDRAW_S", 0.0)
    monkeypatch.setattr("sys.stdin", Screen(1, 1))  # somebody may type
    return Screen(60, 16)


def console(screen):
    return Console(file=screen, width=screen.width, height=screen.height, force_terminal=True, _environ={})


def test_on_a_terminal_events_scroll_above_curves_state_and_the_row_to_type_in(screen):
    sink = recording.terminal(console(screen), about())
    with sink:
        for m in SCRIPT[:3]:
            sink.show(m, PICTURE)
        assert screen.seen[6:10] == [
            "steps: S1 Attach the wheels, S2 Fix the roof",
            "   0:00.5  user     and now?",
            "   0:01.0  state    S1 start  [>] S1 [ ] S2",
            "   0:01.0  says     Take the wheels.",
        ]
        assert screen.seen[10] == "─" * 59
        assert screen.seen[11] == "    speak  ▃▃█  0.900"  # 0.1 of a threshold of 0.2 is a quarter of the height
        assert screen.seen[12] == "      DST  ▃▃▆  0.400"
        assert screen.seen[13] == "    state  [>] S1 Attach the wheels [ ] S2 Fix the roof"
        assert screen.seen[14].startswith("   0:01.0  102 tokens, ")
        assert screen.seen[15] == "you >"
    assert screen.seen[7:12] == [
        "   0:00.0   0:01.0",
        "    speak  ▃▃█",
        "      DST  ▃▃▆",
        "3 frames (0:01.5); spoke 1 time; 1 state change; median 10",
        "ms a frame, p99 10 ms",
    ]
    assert screen.bottom == 15
    assert not screen.hidden


def test_what_the_user_types_stays_until_it_was_heard(screen):
    sink = recording.terminal(console(screen), about())
    with sink:
        screen.write("whe")
        sink.show(moment(0, said="Stop."), PICTURE)
        screen.write("re?")
        sink.show(moment(1), PICTURE)
        assert screen.seen[15] == "you > where?"
        sink.show(moment(2, heard=("where?",)), PICTURE)
        assert screen.seen[15] == "you >"


def test_a_full_row_of_curves_scrolls_away_under_its_times(screen):
    sink = recording.terminal(console(screen), about(["speaking"]))
    with sink:
        for frame in range(40):  # 60 columns less names and value: 37 frames
            sink.show(moment(frame, 0.0 if frame % 2 else 1.0, None), PICTURE)
        assert screen.seen[10:12] == ["   0:00.0  " + "╌" * 30 + " 0:18.0", "    speak  " + "█▁" * 18 + "█"]
        assert screen.seen[13] == "    speak  ▁█▁  0.000"


def test_a_window_that_changes_its_size_is_followed(screen):
    here = console(screen)
    sink = recording.terminal(here, about())
    with sink:
        sink.show(moment(0), PICTURE)
        here.size = (60, 14)
        sink.show(moment(1), PICTURE)
        assert screen.bottom == 14 - 6 - 1
        assert screen.seen[9].startswith("    speak  ▃▃")


def test_without_anybody_to_type_the_cursor_is_hidden_and_comes_back(screen, monkeypatch):
    monkeypatch.setattr("sys.stdin", StringIO())
    seen = []
    sink = recording.terminal(console(screen), about())
    with pytest.raises(KeyboardInterrupt):
        record(sink, broken_off(SCRIPT[:1], lambda: seen.append(screen.hidden)))
    assert seen == [True]
    assert not screen.hidden
    assert any(row.startswith("1 frame (0:00.5)") for row in screen.seen)


def test_a_terminal_too_small_for_the_panel_gets_the_log(screen):
    small = Screen(120, 9)
    record(recording.terminal(console(small), about()), [moment(0, said="Stop.")])
    assert small.seen[1] == "   0:00.0  says     Stop."


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
    assert "http" not in re.sub(r'http-equiv="', "", (tmp_path / "x.html").read_text())


def test_a_number_that_is_none_and_a_head_that_is_none_leave_the_page_whole(tmp_path):
    record(recording.html(tmp_path / "x.html", about(["speaking"])), [moment(0, math.nan, None, seconds=math.inf)])
    _, data = page(tmp_path / "x.html")
    assert data["moments"] == [[1, 100, None, None]]


@pytest.mark.parametrize("kind", ["html", "mp4"])
def test_a_recording_is_whole_up_to_where_the_stream_broke_off(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    sink = getattr(recording, kind)(path, about())
    there = []
    with pytest.raises(KeyboardInterrupt):
        record(sink, broken_off(SCRIPT[:2], lambda: there.append(path.exists())))
    assert there == [False]
    assert len(page(path)[1]["moments"] if kind == "html" else frames(path)) == 2
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_moment_cut_short_by_ctrl_c_is_left_out_of_the_page(tmp_path):
    sink = recording.html(tmp_path / "x.html", about())
    with sink:
        sink.show(moment(0), PICTURE)
        sink.spool.write(b"[1,101,10.0,10")
    assert len(page(tmp_path / "x.html")[1]["moments"]) == 1


@pytest.mark.parametrize("kind", ["html", "mp4"])
def test_a_stream_without_a_moment_leaves_what_was_there(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    path.write_text("old")
    with pytest.raises(ValueError, match="no frame"), getattr(recording, kind)(path, about()):
        raise ValueError("no frame")
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", ["html", "mp4"])
def test_a_name_that_cannot_be_a_file_is_refused_in_one_line(tmp_path, kind):
    (tmp_path / "file").touch()
    for path, found in ((tmp_path, "is a folder"), (tmp_path / "file" / "x", "is no folder")):
        with pytest.raises(InputError, match=found) as error:
            getattr(recording, kind)(path, about())
        assert f"--{kind}" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["html", "mp4"])
def test_a_full_disk_is_an_error_that_names_the_recording_and_leaves_the_old_one(tmp_path, kind, monkeypatch):
    path = tmp_path / f"x.{kind}"
    path.write_text("old")
    sink = getattr(recording, kind)(path, about())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sink, {"html": "_page", "mp4": "_write"}[kind], full)
    with pytest.raises(OSError, match="No space") as error:
        record(sink)
    assert kind == "mp4" or error.value.filename == str(path)
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


# ---- the video ---------------------------------------------------------------------------------------


def frames(path):
    """(seconds, RGB picture) of each frame of a video."""
    with av.open(str(path)) as container:
        return [(frame.time, frame.to_image()) for frame in container.decode(video=0)]


def test_the_video_plays_at_the_streams_time_also_where_frames_were_lost(tmp_path):
    record(recording.mp4(tmp_path / "x.mp4", about()))
    shown = frames(tmp_path / "x.mp4")
    assert [time for time, _ in shown] == [0.0, 0.5, 1.0, 1.5, 3.5, 4.0]
    assert {picture.size for _, picture in shown} == {(1280, 720)}
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert container.duration / 1e6 == pytest.approx(4.5)
    red, green, blue = shown[0][1].getpixel((400, 240))  # the stream's own picture
    assert red > 200
    assert max(green, blue) < 60


def test_a_curve_is_drawn_at_the_right_edge_with_its_threshold_at_half():
    board = stream_video.Board(about())
    low = board.draw(moment(0, 0.1, 0.1), PICTURE)
    high = board.draw(moment(1, 1.0, 0.1, said="Stop."), PICTURE)
    left, top, right, _ = stream_video._CURVES
    frame = (right - left) / stream_video.WINDOW_S / 2  # pixels: 2 frames/s
    x = round(right - frame / 2)
    upper, lower = top + 8, top + 40  # of the upper panel, above and below its middle
    ground = ImageColor.getrgb(stream_video._CARD)
    fired = ImageColor.getrgb(stream_video._FILL["speaking"][1])
    assert low.getpixel((x, upper)) == ground
    assert (high.getpixel((x, upper)), high.getpixel((x, lower))) == (fired, fired)
    later = board.draw(moment(2, 0.1, 0.1), PICTURE)
    assert (later.getpixel((x - round(frame), upper)), later.getpixel((x, upper))) == (fired, ground)  # it moved on


def test_height_puts_the_threshold_at_half():
    assert [recording.height(p, 0.2) for p in (0.0, 0.1, 0.2, 0.6, 1.0)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [recording.height(p, 1.0) for p in (0.5, 1.0)] == [0.25, 0.5]  # never fires below 1
    assert [recording.height(p, 0.0) for p in (0.0, 1.0)] == [0.5, 1.0]  # always fires
    assert [recording.height(p, 0.2) for p in (None, math.nan)] == [0.0, 0.0]


@pytest.mark.parametrize("size", [(1, 1), (9, 640), (640, 9), (641, 359)])
def test_any_picture_and_any_text_can_be_drawn(tmp_path, size):
    words = "Ça va — 完成 ✓ привет مرحبا 🙂 " + HOSTILE + "long" * 400
    steps = [(f"S{i}", words) for i in range(30)]
    state = {step: "in_progress" if i == 15 else "not_started" for i, (step, _) in enumerate(steps)}
    strange = moment(0, None, math.nan, heard=(words, "", words), said=words, updates=((words, "start"),))
    strange["state"] = state
    record(recording.mp4(tmp_path / "x.mp4", about(steps=steps, goal=words, video=words)), [strange],
           Image.new("RGB", size))  # fmt: skip
    assert len(frames(tmp_path / "x.mp4")) == 1


def test_without_h264_the_video_is_mpeg4(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_video.av, "codecs_available", {"mpeg4"})
    record(recording.mp4(tmp_path / "x.mp4", about(fps=29.97)))
    with av.open(str(tmp_path / "x.mp4")) as container:
        assert container.streams.video[0].codec.name == "mpeg4"
        assert len(list(container.decode(video=0))) == 6


def test_text_is_cut_and_wrapped_to_its_width():
    assert stream_video.cut("short", 20, 300) == "short"
    cut = stream_video.cut("word " * 50, 20, 300)
    assert cut.endswith("...")
    assert stream_video._width(cut, 20) <= 300
    lines = stream_video.wrap("one two three " * 20, 20, 200, 2)
    assert len(lines) == 2
    assert lines[1].endswith("...")
    assert max(stream_video._width(line, 20) for line in lines) <= 200
    assert stream_video.wrap("", 20, 200, 2) == ()

"""A stream as an mp4 that plays anywhere: the picture, what was said, the state, and the last 30 s of both curves.

H.264 where this build of FFmpeg has it, else MPEG-4, 1280 x 720, a picture per moment at the stream's own rate: the
time in the player is the time in the stream, also where frames were lost. Drawn with PIL and fonts that are
installed already: PIL's own for ASCII, matplotlib's DejaVu for what else it has (no Chinese, Japanese or Korean).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Final, Self, cast

import av
import av.container
from PIL import Image, ImageDraw, ImageFont

from pipeline.storage import move
from pipeline.terminal import clock, plain
from trainer.live.sinks import HEAD_NAMES, About, Closing, Moment, events, height, prepare, thresholds

SIZE: Final = (1280, 720)
WINDOW_S: Final = 30.0  # of the curves
_CODECS: Final[dict[str, dict[str, str]]] = {  # the first that there is, with its options
    "libx264": {"preset": "veryfast", "crf": "23", "rc-lookahead": "10"},
    "mpeg4": {"b": "2M"},
}
_KEY_S: Final = 10  # seconds between pictures that a player can jump to


class VideoSink(Closing):
    container: av.container.OutputContainer
    stream: av.VideoStream

    def __init__(self, path: Path, about: About) -> None:
        prepare(path, "mp4")
        self.path, self.board = path, Board(about)
        self.rate = Fraction(about["fps"]).limit_denominator(1001)
        self.draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.first: int | None = None

    def __enter__(self) -> Self:
        self.draft.touch()  # a folder without permission is the system's own error
        try:
            self.container = av.open(str(self.draft), "w", format="mp4")
            self.stream = _stream(self.container, self.rate)
        except BaseException:
            self.draft.unlink()
            raise
        return self

    def show(self, moment: Moment, image: Image.Image) -> None:
        picture = av.VideoFrame.from_image(self.board.draw(moment, image))
        first = moment["frame"] if self.first is None else self.first
        picture.pts, picture.time_base = moment["frame"] - first, 1 / self.rate
        self._write(picture)
        self.first = first

    def _write(self, picture: av.VideoFrame | None) -> None:
        with self._system_errors():
            self.container.mux(self.stream.encode(picture))

    def close(self) -> None:
        """End the file and give it its name; no file is left of a stream without a moment."""
        try:
            with self._system_errors(), self.container:
                if self.first is not None:
                    self._write(None)
            if self.first is not None:
                move(self.draft, self.path)
        finally:
            with suppress(OSError):
                self.draft.unlink()

    @contextmanager
    def _system_errors(self) -> Iterator[None]:
        """FFmpeg's errors as OSErrors that name the recording."""
        try:
            yield
        except av.FFmpegError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def _stream(container: av.container.OutputContainer, rate: Fraction) -> av.VideoStream:
    name = next(name for name in _CODECS if name in av.codecs_available)
    stream = cast(av.VideoStream, container.add_stream(name, rate=rate, options=_CODECS[name]))
    stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
    stream.codec_context.time_base = 1 / rate
    stream.codec_context.max_b_frames = 0  # else the file's length is too short where frames were lost
    stream.codec_context.gop_size = max(1, round(_KEY_S * rate))
    return stream


# ---- drawing -----------------------------------------------------------------------------------------

_PAGE, _CARD, _LINE, _TEXT, _SOFT, _THRESHOLD = "#13161a", "#1b1f25", "#2d333b", "#e4e7eb", "#98a1ad", "#59616c"
_HUE: Final = {"speaking": "#6ba3f8", "dst_update": "#f0a04b"}
_FILL: Final = {"speaking": ("#26354d", "#46689a"), "dst_update": ("#46361f", "#a06f37")}  # under, over the threshold
_KIND: Final = {"says": _HUE["speaking"], "state": _HUE["dst_update"], "user": "#62c48f", "lost": "#f19a89"}
_EDGE: Final = 24
_PICTURE: Final = (_EDGE, _EDGE, 784, 452)
_SIDE: Final = (812, _EDGE, SIZE[0] - _EDGE, 452)
_WORDS: Final = (_EDGE, 466, SIZE[0] - _EDGE, 560)
_CURVES: Final = (112, 572, SIZE[0] - _EDGE, 696)
_ROW: Final = 27  # pixels of a step
_MOST_STEPS: Final = 9
_FRESH_S: Final = 8.0  # how long what happened is bright
_LOG: Final = 40  # events kept for the side column


class Board:
    """The picture of a moment. It remembers the curves' last 30 s, the last words and the last few events."""

    def __init__(self, about: About) -> None:
        self.about, self.at = about, thresholds(about)
        self.curves: deque[tuple[float, tuple[float, ...], tuple[bool, ...]]] = deque()
        self.log: deque[tuple[float, str, str]] = deque(maxlen=_LOG)
        self.words: dict[str, tuple[float, str]] = {}  # the user's and the assistant's last, and when
        self.state: dict[str, str] = {}
        self.changed: dict[str, float] = {}
        self.ground = self._ground()

    def draw(self, moment: Moment, image: Image.Image) -> Image.Image:
        """RGB picture of `SIZE`; `image` may have any size."""
        self._remember(moment)
        canvas = self.ground.copy()
        self._picture(canvas, image)
        self._side(canvas, moment)
        self._captions(canvas, moment["time_s"])
        self._panels(canvas, moment)
        return canvas

    def _remember(self, moment: Moment) -> None:
        now, heads = moment["time_s"], self.about["heads"]
        fires = {"speaking": moment["said"] is not None, "dst_update": moment["updates"] is not None}
        levels = tuple(height(moment["probabilities"].get(head), self.at[head]) for head in heads)
        self.curves.append((now, levels, tuple(fires[head] for head in heads)))
        while self.curves[0][0] <= now - WINDOW_S + 1e-6:
            self.curves.popleft()
        for event in events(moment):
            self.log.append((now, event.kind, event.text))
            if event.kind in ("user", "says"):
                self.words[event.kind] = (now, event.text)
        self.changed |= {step: now for step, how in moment["state"].items() if self.state.get(step, how) != how}
        self.state = moment["state"]

    # ---- parts of the picture

    def _ground(self) -> Image.Image:
        canvas = Image.new("RGB", SIZE, _PAGE)
        draw = ImageDraw.Draw(canvas)
        draw.rectangle(_PICTURE, _CARD)
        for head, (top, base) in self._panel_boxes():
            draw.rectangle((_CURVES[0], top, _CURVES[2], base), _CARD)
            middle = (top + base) // 2
            write(canvas, (_EDGE, top - 1), HEAD_NAMES[head], 17, _HUE[head])
            write(canvas, (_CURVES[0] - 10, middle - 8), f"{self.at[head]:.2g}", 13, _SOFT, right=True)
        return canvas

    def _panel_boxes(self) -> Iterator[tuple[str, tuple[int, int]]]:
        heads = self.about["heads"]
        tall = (_CURVES[3] - _CURVES[1]) // len(heads)
        for i, head in enumerate(heads):
            yield head, (_CURVES[1] + i * tall, _CURVES[1] + (i + 1) * tall - 12)

    def _picture(self, canvas: Image.Image, image: Image.Image) -> None:
        left, top, right, base = _PICTURE
        scale = min((right - left) / image.width, (base - top) / image.height)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        shown = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
        canvas.paste(shown, (left + (right - left - size[0]) // 2, top + (base - top - size[1]) // 2))

    def _side(self, canvas: Image.Image, moment: Moment) -> None:
        """The column at the right: what and where in it, the goal, the steps, and what happened last."""
        left, y, right, base = _SIDE
        clock_at = clock(moment["time_s"], tenths=True)
        write(canvas, (right, y - 6), clock_at, 30, _TEXT, right=True)
        title = plain(Path(self.about["video"]).name or self.about["video"])
        write(canvas, (left, y - 4), cut(title, 19, right - left - 130), 19, _TEXT)
        facts = f"{plain(self.about['arm'])}, {moment['tokens']:,} tokens"
        write(canvas, (left, y + 22), cut(facts, 14, right - left - 110), 14, _SOFT)
        y += 52
        for line in wrap(plain(self.about["goal"] or ""), 15, right - left, 2):
            write(canvas, (left, y), line, 15, _SOFT)
            y += 20
        y = self._steps(canvas, y + 8, moment["time_s"])
        self._last(canvas, y + 10, base, moment["time_s"])

    def _steps(self, canvas: Image.Image, y: int, now: float) -> int:
        left, _, right, _ = _SIDE
        names, steps = dict(self.about["steps"]), list(self.state)
        current = next((i for i, step in enumerate(steps) if self.state[step] != "completed"), len(steps))
        first = max(0, min(current - 2, len(steps) - _MOST_STEPS))
        for step in steps[first : first + _MOST_STEPS]:
            how = self.state[step]
            fresh = now - self.changed.get(step, -_FRESH_S) < _FRESH_S
            _mark(
                ImageDraw.Draw(canvas), left, y + 3, how, _HUE["dst_update"] if fresh or how == "in_progress" else _SOFT
            )
            colour = _HUE["dst_update"] if fresh else _TEXT if how == "in_progress" else _SOFT
            name = plain(f"{step}  {names.get(step, '')}".strip())
            write(canvas, (left + 27, y), cut(name, 17, right - left - 27), 17, colour)
            y += _ROW
        if len(steps) > _MOST_STEPS:
            done = sum(how == "completed" for how in self.state.values())
            write(canvas, (left, y), f"{done} of {len(steps)} steps done", 14, _SOFT)
            y += 20
        return y

    def _last(self, canvas: Image.Image, top: int, base: int, now: float) -> None:
        """The last events, the newest lowest, as many as fit."""
        left, _, right, _ = _SIDE
        room = (base - top - 10) // 21
        if room < 1 or not self.log:
            return
        ImageDraw.Draw(canvas).line((left, top, right, top), _LINE)
        for i, (when, kind, text) in enumerate(list(self.log)[-room:]):
            y = top + 10 + 21 * i
            write(canvas, (left + 52, y), clock(when, tenths=True), 13, _SOFT, right=True)
            write(canvas, (left + 62, y), kind, 13, _KIND.get(kind, _SOFT))
            colour = _TEXT if now - when < _FRESH_S else _SOFT
            write(canvas, (left + 116, y), cut(text, 13, right - left - 116), 13, colour)

    def _captions(self, canvas: Image.Image, now: float) -> None:
        left, top, right, _ = _WORDS
        if "user" in self.words and now - self.words["user"][0] < _FRESH_S:
            write(canvas, (left, top), cut(f"user: {self.words['user'][1]}", 18, right - left), 18, _KIND["user"])
        if "says" in self.words:
            when, text = self.words["says"]
            for i, line in enumerate(wrap(text, 25, right - left, 2)):
                write(canvas, (left, top + 25 + 32 * i), line, 25, _TEXT if now - when < _FRESH_S else _SOFT)

    def _panels(self, canvas: Image.Image, moment: Moment) -> None:
        left, _, right, _ = _CURVES
        draw = ImageDraw.Draw(canvas)
        for k, (head, (top, base)) in enumerate(self._panel_boxes()):
            self._curve(draw, k, head, top, base)
            middle = (top + base) / 2
            draw.line([(left, middle), (right, middle)], _THRESHOLD)
            p = moment["probabilities"].get(head)
            value = "-" if p is None else f"{p:.2f}"
            write(canvas, (_EDGE, top + 20), value, 22, _HUE[head] if self.curves[-1][2][k] else _TEXT)

    def _curve(self, draw: ImageDraw.ImageDraw, k: int, head: str, top: int, base: int) -> None:
        """Head k's last 30 s as steps, the newest at the right edge; a gap where frames were lost."""
        left, _, right, _ = _CURVES
        now, one = self.curves[-1][0], 1 / self.about["fps"]
        scale = (right - left) / WINDOW_S
        under, over = _FILL[head]
        line: list[tuple[float, float]] = []
        for time, levels, fired in self.curves:
            x0 = max(left, right - (now + one - time) * scale)
            x1 = max(x0, right - (now - time) * scale)
            y = base - levels[k] * (base - top)
            if line and x0 > line[-1][0] + 1:
                draw.line(line, _HUE[head], 2)
                line.clear()
            draw.rectangle((x0, y, x1, base), over if fired[k] else under)
            line += [(x0, y), (x1, y)]
            if fired[k]:
                x = (x0 + x1) / 2
                draw.polygon([(x - 5, top - 8), (x + 5, top - 8), (x, top - 1)], _HUE[head])
        draw.line(line, _HUE[head], 2)


def _mark(draw: ImageDraw.ImageDraw, x: int, y: int, how: str, colour: str) -> None:
    """The sign of a step's state: an empty box, one with a triangle, a filled one with a hook, or one with a bar."""
    draw.rounded_rectangle((x, y, x + 16, y + 16), 4, colour if how == "completed" else None, colour, 2)
    if how == "completed":
        draw.line([(x + 4, y + 8), (x + 7, y + 12), (x + 13, y + 5)], _PAGE, 2)
    elif how == "in_progress":
        draw.polygon([(x + 6, y + 4), (x + 6, y + 12), (x + 12, y + 8)], colour)
    elif how != "not_started":
        draw.line([(x + 5, y + 8), (x + 11, y + 8)], colour, 2)


# ---- text --------------------------------------------------------------------------------------------


def write(canvas: Image.Image, at: tuple[int, int], text: str, size: int, colour: str, right: bool = False) -> None:
    """Text with its top left, or top right, corner at a point."""
    left, top, mask = _drawn(text, size)
    canvas.paste(colour, (at[0] + left - (mask.width if right else 0), at[1] + top), mask)


@lru_cache(maxsize=1024)  # most of what is written was written a moment ago
def _drawn(text: str, size: int) -> tuple[int, int, Image.Image]:
    """The text as a mask, and where it lies from the point it is written at; both fonts stand on one line."""
    font = _font(size, text.isascii())
    left, top, right, base = (round(edge) for edge in font.getbbox(text, anchor="ls"))
    mask = Image.new("L", (max(1, right - left), max(1, base - top)))
    ImageDraw.Draw(mask).text((-left, -top), text, 255, font, anchor="ls")
    return left, round(0.95 * size) + top, mask


@lru_cache(maxsize=64)
def _font(size: int, ascii_only: bool) -> ImageFont.FreeTypeFont:
    if ascii_only:
        return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), round(size * 0.92))


def _width(text: str, size: int) -> float:
    return _font(size, text.isascii()).getlength(text)


@lru_cache(maxsize=512)
def cut(text: str, size: int, width: float) -> str:
    """The text, or its beginning and '...' where all of it is wider than `width` pixels."""
    text = text[:400]
    if _width(text, size) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if _width(text[:middle] + "...", size) <= width:
            low = middle
        else:
            high = middle - 1
    return text[:low].rstrip() + "..."


@lru_cache(maxsize=64)
def wrap(text: str, size: int, width: float, most: int) -> tuple[str, ...]:
    """At most `most` lines of at most `width` pixels; the last is cut."""
    words = text[:600].split()
    lines: list[str] = []
    while words and len(lines) < most - 1:
        count = 1
        while count < len(words) and _width(" ".join(words[: count + 1]), size) <= width:
            count += 1
        lines.append(cut(" ".join(words[:count]), size, width))
        words = words[count:]
    return (*lines, cut(" ".join(words), size, width)) if words else tuple(lines)

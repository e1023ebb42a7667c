"""A stream as one self-contained page: curves, what was said and when, the state of every step, pictures.

Moments are coded one line each (about 25 bytes) into a spool without a name, beside the page; closing copies it
into the template `stream.html` and renames, so memory stays flat: 8 hours at 2 frames/s are a page of some 7 MB.
Pictures are thinned as the stream grows, to every second, fourth, ... one. Text from the stream reaches the page as
JSON and is set with `textContent`, as in `inspect_html`.
"""

from __future__ import annotations

import base64
import math
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Final, Self

from PIL import Image

from pipeline.storage import naming, replacing
from pipeline.terminal import plain
from pipeline.viewer import coded, page_around_data
from trainer.live.sinks import About, Closing, Moment, finite, prepare, thresholds

PICTURE_BYTES: Final = 5_000_000  # of pictures every PICTURE_S, thinned
EVENT_PICTURE_BYTES: Final = 3_000_000  # of those when something happened, thinned
PICTURE_S: Final = 2.0
PICTURE_SIDE: Final = 192  # pixels
MAX_TEXT: Final = 400  # characters shown of one text


class HtmlSink(Closing):
    spool: IO[bytes]

    def __init__(self, path: Path, about: About) -> None:
        prepare(path, "html")
        self.path, self.about = path, about
        self.frame: int | None = None
        self.state: dict[str, str] | None = None
        self.regular, self.special = Pictures(PICTURE_BYTES), Pictures(EVENT_PICTURE_BYTES)
        self.next_picture_s = -math.inf

    def __enter__(self) -> Self:
        self.spool = tempfile.TemporaryFile(dir=self.path.parent)
        return self

    def show(self, moment: Moment, image: Image.Image) -> None:
        extras = self._extras(moment)
        p = [_four_digits(moment["probabilities"].get(head)) for head in self.about["heads"]]
        step = moment["frame"] - (self.frame if self.frame is not None else -1)
        row = [step, moment["tokens"], round(1000 * moment["seconds"], 1), *p, *([extras] if extras else [])]
        with naming(self.path):
            self.spool.write(coded(finite(row)).encode() + b"\n")
        if self.frame is None or extras:
            self.special.offer(moment["frame"], image)
        elif moment["time_s"] >= self.next_picture_s:
            self.next_picture_s = moment["time_s"] + PICTURE_S
            self.regular.offer(moment["frame"], image)
        self.frame, self.state = moment["frame"], moment["state"]

    def _extras(self, moment: Moment) -> dict[str, Any]:
        """What happened, by one letter: u heard, d DST text, c changes, a said, s state, x rebuilt, l lost."""
        found: dict[str, Any] = {}
        if moment["heard"]:
            found["u"] = [_short(text) for text in moment["heard"]]
        if moment["updates"] is not None:
            found["c"] = [[_short(step), _short(change)] for step, change in moment["updates"]]
            found["d"] = _short(moment["dst_text"] or "")
        if moment["said"] is not None:
            found["a"] = _short(moment["said"])
        if moment["state"] != self.state and (moment["state"] or self.state):
            found["s"] = {_short(step): name for step, name in moment["state"].items()}
        if moment["started_over"]:
            found["x"] = 1
        if moment["skipped"]:
            found["l"] = moment["skipped"]
        return found

    def close(self) -> None:
        """Assemble the page and give it its name; nothing is written of a stream without a moment."""
        with self.spool:
            if self.frame is None:
                return
            with replacing(self.path) as draft, draft.open("wb") as page:
                for part in self._page():
                    page.write(part)

    def _page(self) -> Iterator[bytes]:
        before, after = page_around_data(f"{plain(self.about['video'])} - stream")
        yield f'{before}{{"page":"stream","about":{coded(self._about())},"moments":['.encode()
        yield from self._rows()
        yield b'],"pictures":{'
        pictures = sorted((self.regular.kept | self.special.kept).items())
        for i, (frame, jpeg) in enumerate(pictures):
            yield f'{"," if i else ""}"{frame}":"{base64.b64encode(jpeg).decode()}"'.encode()
        yield f"}}}}{after}".encode()

    def _rows(self) -> Iterator[bytes]:
        """Whole lines of the spool; one cut short by Ctrl-C is left out."""
        self.spool.seek(0)
        for i, line in enumerate(self.spool):
            if line.endswith(b"\n"):
                yield (b"," if i else b"") + line[:-1]

    def _about(self) -> dict[str, Any]:
        about = {key: plain(self.about[key]) for key in ("video", "run", "arm")}  # type: ignore[literal-required]
        at = thresholds(self.about)
        return about | {
            "fps": self.about["fps"],
            "heads": self.about["heads"],
            "thresholds": [at[head] for head in self.about["heads"]],
            "steps": [[_short(step), _short(name)] for step, name in self.about["steps"]],
            "goal": _short(self.about["goal"] or ""),
        }


class Pictures:
    """JPEGs by frame: every `stride`-th that is offered, the stride doubled when they pass `most` bytes."""

    def __init__(self, most: int) -> None:
        self.most, self.stride, self.offered = most, 1, 0
        self.kept: dict[int, bytes] = {}
        self.size = 0

    def offer(self, frame: int, image: Image.Image) -> None:
        if self.offered % self.stride == 0:
            self.kept[frame] = _jpeg(image)
            self.size += len(self.kept[frame])
            while self.size > self.most and len(self.kept) > 1:
                self.kept = dict(list(self.kept.items())[::2])
                self.size = sum(map(len, self.kept.values()))
                self.stride *= 2
        self.offered += 1


def _jpeg(image: Image.Image) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    held = BytesIO()
    small.save(held, "JPEG", quality=68)
    return held.getvalue()


def _four_digits(probability: float | None) -> int | None:
    return None if probability is None or not math.isfinite(probability) else round(10_000 * probability)


def _short(text: str) -> str:
    text = plain(text)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"

"""The attack on `stream`: stopped, its video damaged, its disk full, its checkpoint edited, typed nonsense at."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
from collections.abc import Callable
from typing import Any

from .arena import Arena, Ran, fault, files
from .attacks import LOST, OTHER, REFUSED, SAME, Verdict, damage, must

VIDEO = "mp4/frames/nusar-test-0000__view0.mp4"
KEPT = ("--html", "kept/page.html")
ARGV = ("stream", "run", VIDEO, "--task", "raw/test_training.json", "--clip", "0", "--threshold",
        "speaking=0,dst_update=0", "--json")  # fmt: skip


def live(arena: Arena, rng: random.Random) -> Verdict:
    """`stream` over a video: what it says of each frame is what it says undisturbed, up to where it ends by name."""
    key = "stream"
    if key not in arena.result:
        arena.fresh("raw", "mp4", "run")
        with arena.undisturbed():
            ran = must(arena.run(*ARGV))
        arena.result[key], arena.seconds[key] = _moments(ran), ran.seconds  # type: ignore[assignment]
        assert len(arena.result[key]) > 50
    arena.fresh("raw", "mp4", "run")
    (arena.here / "kept").mkdir()
    return rng.choice((_stopped, _stopped, _bad_video, _no_room, _bad_checkpoint, _typed))(arena, rng)


def _moments(ran: Ran) -> list[str]:
    """Each frame's line but the clock; a last one that was cut off is left out."""
    found = []
    for line in ran.out.splitlines():
        try:
            told = json.loads(line)
        except ValueError:
            break
        found.append(json.dumps({name: value for name, value in told.items() if name != "seconds"}))
    return found


def _judge(arena: Arena, ran: Ran, what: str, whole: bool = True) -> Verdict:
    """The verdict on a stream over the video as it is."""
    expected: Any = arena.result["stream"]
    if why := fault(ran, ["kept", "run/last"]):
        return Verdict(LOST, what, why)
    found = _moments(ran)
    if found != expected[: len(found)] or (ran.done and whole and len(found) < len(expected)):
        return Verdict(LOST, what, f"{len(found)} frames of {len(expected)}, or not as undisturbed")
    return Verdict(SAME if ran.done else REFUSED, what, "" if ran.done else ran.words)


def _stopped(arena: Arena, rng: random.Random) -> Verdict:
    sent = rng.choice((signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
    after = rng.uniform(0, arena.seconds["stream"])
    ran = arena.run(*ARGV, *KEPT, stop=(after, sent))
    what = f"{sent.name} after {after:.2f} s"
    verdict = _judge(arena, ran, what, whole=False)
    if verdict.outcome == LOST:
        return verdict
    again = _judge(arena, arena.run(*ARGV, *KEPT), f"{what}, then again")
    wrong = [path.name for path in files(arena.here, "kept/[!.]*") if not path.stat().st_size]
    return Verdict(LOST, what, f"an empty {wrong[0]}") if wrong else again


def _bad_video(arena: Arena, rng: random.Random) -> Verdict:
    folder = rng.random() < 0.3
    if folder:
        path = rng.choice(list(files(arena.kept, "png/frames/nusar-test-*/*.png")))
        video = str(path.parent.relative_to(arena.kept))
        arena.fresh("raw", "png", "run")
        path = arena.here / path.relative_to(arena.kept)
    else:
        video, path = VIDEO, arena.here / VIDEO
    how = damage(rng, path, list(files(path.parent, "*")))
    ran = arena.run(*ARGV[:2], video, *ARGV[3:])
    what = f"{video}: {how}"
    if why := fault(ran, [path.name, path.parent.name, "nusar-test"]):
        return Verdict(LOST, what, why)
    same = _moments(ran) == arena.result["stream"]
    return Verdict(REFUSED, what, ran.words) if not ran.done else Verdict(SAME if same else OTHER, what)


def _no_room(arena: Arena, rng: random.Random) -> Verdict:
    size = int(rng.uniform(1, 200_000))
    prepare: Callable[[], None] = lambda: None  # noqa: E731
    if arena.can_mount:
        arena.mount("kept", size)
    else:
        prepare = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size + 400_000, size + 400_000))  # noqa: E731
    ran = arena.run(*ARGV, *KEPT, prepare=prepare)
    return _judge(arena, ran, f"{size:,} bytes of room for the page")


def _bad_checkpoint(arena: Arena, rng: random.Random) -> Verdict:
    paths = list(files(arena.here, "run/last/*.json", "run/last/*.safetensors"))
    path = rng.choice(paths)
    how = damage(rng, path, paths)
    return _judge(arena, arena.run(*ARGV), f"run/last/{path.name}: {how}")


def _typed(arena: Arena, rng: random.Random) -> Verdict:
    """What is typed may change what is said; it may not end it."""
    how, text = rng.choice((
        ("bytes", rng.randbytes(2000)), ("a line of 5 MB", b"x" * 5_000_000 + b"\n"), ("NULs", b"\0" * 99 + b"\n"),
        ("markers", b"<image><|im_end|>\n\x1b[31m\n"), ("half a character", b"\xf0\x9f"),
        ("empty lines", b"\n" * 50_000),
    ))  # fmt: skip
    path = arena.here / "typed"
    path.write_bytes(text)
    ran = arena.run(*ARGV, prepare=lambda: os.dup2(os.open(path, os.O_RDONLY), 0) and None)
    what = f"typed: {how}"
    if why := fault(ran):
        return Verdict(LOST, what, why)
    return Verdict(OTHER if ran.done else REFUSED, what, ran.words)

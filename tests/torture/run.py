"""`just torture`: for some minutes, tries to make the product lose something; prints what was tried, what was lost.

    uv run python -m tests.torture.run --minutes 10 --seed 0
    uv run python -m tests.torture.run --only disk --seed 17 --tries 1     # one attempt again, as it was
    uv run python -m tests.torture.run --prove                             # each attack finds what is broken on purpose

What counts as lost: `attacks`. An attempt is a function of (attack, seed); the n-th of a run has seed SEED + n. The
minutes are shared out by weight, and every attack gets its turn. Exit status 1 if anything was lost. One heavy
process at a time; as root, disks are small tmpfs mounts in a namespace of their own, else limits on file sizes.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .arena import Arena, build, warm
from .attacks import LOST, OUTCOMES, Attack, Verdict, corrupt, disk, frames, kill, odd, reorder, twice
from .garbage import examples, forge, garbage
from .live import live

ATTACKS: dict[str, tuple[Attack, float]] = {  # and their share of the time
    "kill": (kill, 5),
    "corrupt": (corrupt, 5),
    "reorder": (reorder, 1.5),
    "disk": (disk, 4),
    "frames": (frames, 3),
    "garbage": (garbage, 3),
    "examples": (examples, 2),
    "forge": (forge, 2.5),
    "live": (live, 2),
    "twice": (twice, 1.5),
    "odd": (odd, 1),
}


@dataclass
class Tally:
    """What came of the attempts so far."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    seconds: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    def note(self, name: str, seed: int, verdict: Verdict, seconds: float) -> None:
        self.counts[name][verdict.outcome] += 1
        self.seconds[name] += seconds
        if verdict.outcome == LOST:
            told = f"{verdict.what}: {verdict.why}\n    again: --only {name} --seed {seed} --tries 1"
            self.lost.append(f"{name}: {told}")
            print(f"LOST  {self.lost[-1]}", flush=True)


def attempt(arena: Arena, name: str, seed: int) -> Verdict:
    """One attempt; an error of the attack itself counts as lost: it saw what it did not expect."""
    try:
        return ATTACKS[name][0](arena, random.Random(f"{name} {seed}"))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict(LOST, f"the attack itself, {Path(where.filename).name}:{where.lineno}", repr(error)[:500])


def turns(names: list[str], end: float, tally: Tally) -> Iterator[str]:
    """Names of attacks until the time is over: each once, then the one that had least of its share."""
    yield from names
    while time.monotonic() < end:
        yield min(names, key=lambda name: tally.seconds[name] / ATTACKS[name][1])


def torture(arena: Arena, names: list[str], minutes: float, seed: int, tries: int | None) -> Tally:
    """Attack for so many minutes, or each `tries` times."""
    tally, end = Tally(), time.monotonic() + 60 * minutes
    todo = iter([name for name in names for _ in range(tries)]) if tries else turns(names, end, tally)
    for name in todo:
        began, number = time.monotonic(), seed + sum(tally.counts[name].values())
        verdict = attempt(arena, name, number)
        tally.note(name, number, verdict, time.monotonic() - began)
    return tally


def table(tally: Tally) -> str:
    """attack, tried, one column an outcome."""
    heads = ["attack", "tried", *OUTCOMES, "seconds"]
    rows = [
        [name, sum(counts.values()), *(counts[outcome] for outcome in OUTCOMES), round(tally.seconds[name])]
        for name, counts in tally.counts.items()
    ]
    rows.append(["in all", *(sum(row[i] for row in rows) for i in range(1, len(heads)))])
    texts = [heads, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(text[i]) for text in texts) for i in range(len(heads))]
    return "\n".join(
        "  ".join(text[i].ljust(widths[i]) if i == 0 else text[i].rjust(widths[i]) for i in range(len(heads)))
        for text in texts
    )


def main(argv: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=[*ATTACKS], help="this attack, repeatable")
    parser.add_argument("--tries", type=int, help="so many attempts of each attack, instead of minutes")
    parser.add_argument("--prove", action="store_true", help="break the product on purpose: is it found?")
    parser.add_argument("--keep", type=Path, help="a new folder for the world, which stays")
    asked = parser.parse_args(argv)
    warm()
    root = asked.keep or Path(tempfile.mkdtemp(prefix="torture-"))
    began, arena = time.monotonic(), None
    try:
        arena = build(root.resolve(), light=bool(asked.prove or (asked.tries and asked.tries < 3)))
        print(f"a world to attack below {root}, in {time.monotonic() - began:.0f} s", flush=True)
        if asked.prove:
            from .proof import prove

            return prove(arena, asked.only or [])
        tally = torture(arena, asked.only or [*ATTACKS], asked.minutes, asked.seed, asked.tries)
    except KeyboardInterrupt:
        print("stopped")
        return 130
    finally:
        if arena is not None:
            arena.unmount()
        if asked.keep is None:
            shutil.rmtree(root, ignore_errors=True)
    print(f"\n{table(tally)}\n")
    print(f"{arena.commands:,} processes in {time.monotonic() - began:.0f} s, seed {asked.seed}")
    print("\n".join([f"lost: {len(tally.lost)}", *tally.lost]) if tally.lost else "lost: nothing")
    return 1 if tally.lost else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # torch and TensorBoard were imported, not used: nothing of theirs is to be wound up

"""The dialog state: its replay (after transitions, by frame, before each clip of a conversation), and updates as text.

Generated files give split conversations a wrong initial state (the segment's end state, or none). The state before a
clip is therefore replayed over the earlier clips of its conversation; a given state counts only where there are none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from operator import itemgetter
from typing import Final, NamedTuple

import numpy as np

from pipeline.schema import STATES, TRANSITIONS

NOT_STARTED: Final = "not_started"
Update = tuple[str, str]  # (step id, transition)
Updates = tuple[Update, ...]  # in order
_AMBIGUOUS: Final = re.compile(r'^["\s]|,|\s$|^$')
_PIECE: Final = re.compile(r'(?:\s*"(?:[^"\\]|\\.)*"(?=\s*->)|[^,])[^,]*')  # a quoted id may hold commas


def initial_state(steps: Iterable[str], given: Mapping[str, str] | Iterable[tuple[str, str]]) -> dict[str, str]:
    """The state of every step id: as `given`, else not started."""
    return dict.fromkeys(steps, NOT_STARTED) | dict(given)


def replay(before: Mapping[str, str], updates: Iterable[Update]) -> dict[str, str]:
    """The state after `updates`; a step left out of `before` is not started."""
    return dict(before) | {step: TRANSITIONS[transition] for step, transition in updates}


def replay_frames(before: Mapping[str, str], updates: Iterable[tuple[int, Update]], frames: int) -> np.ndarray:
    """int64 [frames, steps]: index in STATES of each step of `before` at the end of every frame.

    updates: (frame, update) in order, frames counted from 0. Unknown steps and transitions change nothing.
    """
    column = {step: i for i, step in enumerate(before)}
    states = np.tile(np.array([STATES.index(state) for state in before.values()], np.int64), (frames, 1))
    for frame, (step, transition) in updates:
        if step in column and transition in TRANSITIONS:
            states[frame:, column[step]] = STATES.index(TRANSITIONS[transition])
    return states


def contradicts(before: Mapping[str, str], updates: Iterable[Update]) -> bool:
    """Whether some step's first update is impossible from `before`: it changes nothing, or starts what is completed."""
    for step, transition in dict(reversed(list(updates))).items():
        state = before.get(step, NOT_STARTED)
        if TRANSITIONS[transition] == state or (transition == "start" and state == "completed"):
            return True
    return False


def lacks(before: Mapping[str, str], updates: Iterable[Update]) -> bool:
    """Whether the first update of some step completes, pauses or resumes it though `before` has not started it."""
    first = dict(reversed(list(updates))).items()
    begun = [step for step, transition in first if transition in ("complete", "pause", "resume")]
    return any(before.get(step, NOT_STARTED) == NOT_STARTED for step in begun)


class Segment(NamedTuple):
    """One clip of a conversation."""

    first_turn: int  # event frame of its first turn; no update of the clip is earlier
    updates: Sequence[tuple[int, str, str]]  # (event frame, step id, transition), in order
    given: Mapping[str, str] | None  # None: not given, or impossible


def states_before(segments: Sequence[Segment]) -> list[dict[str, str]]:
    """The state before each clip of one conversation, replayed over the clips that start earlier.

    Of those, updates up to the clip's first turn count, but for the ones that the clip repeats: generators begin a clip
    with the last turns of the one before. The earliest clips start from their given state.
    """
    by_time = sorted(segments, key=itemgetter(0))
    first = by_time[0].first_turn
    base = next((s.given for s in by_time if s.first_turn == first and s.given), {})
    updates: list[tuple[int, int, tuple[int, str, str]]] = []  # (frame, first turn of the clip it is from, update)
    known: set[tuple[int, str, str]] = set()
    for segment in by_time:
        updates += [(update[0], segment.first_turn, update) for update in segment.updates if update not in known]
        known.update(segment.updates)
    updates.sort(key=itemgetter(0))
    states = []
    for start, own, given in segments:
        before = [u[1:] for at, of, u in updates if at < start or (at == start and of < start and u not in own)]
        states.append(dict(given or base) if start == first else replay(base, before))
    return states


def write_updates(updates: Iterable[Update]) -> str:
    """The updates as a model reads and writes them: 'S1->complete, S2->start'.

    A step id that would not read back as it is (a comma, outer white space, a leading quote, nothing at all) is written
    as a JSON string: '"step 1, toy"->start'.
    """
    return ", ".join(
        f"{json.dumps(step, ensure_ascii=False) if _AMBIGUOUS.search(step) else step}->{transition}"
        for step, transition in updates
    )


def parse_updates(text: str) -> Updates:
    """The updates that `write_updates` wrote; other pieces are skipped: a model's output may be malformed."""
    updates = []
    for piece in _PIECE.findall(text):
        step, _, transition = (part.strip() for part in piece.rpartition("->"))
        if step and transition in TRANSITIONS:
            with suppress(ValueError):  # a quote that is part of the name
                step = str(json.loads(step)) if step.startswith('"') else step
            updates.append((step, transition))
    return tuple(updates)

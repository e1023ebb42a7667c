"""Replay of the dialog state: what a step's state is after its transitions, and before each clip of a conversation.

Generated files give split conversations a wrong initial state (the segment's end state, or none). The state before a
clip is therefore replayed over the earlier clips of its conversation; a given state counts only where there are none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

from pipeline.schema import TRANSITIONS

NOT_STARTED: Final = "not_started"
Updates = Iterable[tuple[str, str]]  # (step id, transition), in order


def replay(before: Mapping[str, str], updates: Updates) -> dict[str, str]:
    """The state after `updates`; a step left out of `before` is not started."""
    return dict(before) | {step: TRANSITIONS[transition] for step, transition in updates}


def contradicts(before: Mapping[str, str], updates: Updates) -> bool:
    """Whether some step's first update is impossible from `before`: it changes nothing, or starts what is completed."""
    for step, transition in _first(updates):
        was = before.get(step, NOT_STARTED)
        if TRANSITIONS[transition] == was or (transition == "start" and was == "completed"):
            return True
    return False


def lacks(before: Mapping[str, str], updates: Updates) -> bool:
    """Whether the first update of some step completes, pauses or resumes it though `before` has not started it."""
    return any(
        transition in ("complete", "pause", "resume") and before.get(step, NOT_STARTED) == NOT_STARTED
        for step, transition in _first(updates)
    )


def _first(updates: Updates) -> Iterable[tuple[str, str]]:
    """The first update of each step."""
    first: dict[str, str] = {}
    for step, transition in updates:
        first.setdefault(step, transition)
    return first.items()


@dataclass(frozen=True)
class Segment:
    """One clip of a conversation."""

    first_turn: int  # event frame of its first turn
    updates: Sequence[tuple[int, str, str]]  # (event frame, step id, transition), in order
    given: Mapping[str, str] | None  # None: not given, or impossible


def states_before(segments: Sequence[Segment]) -> list[dict[str, str]]:
    """The state before each clip of one conversation, replayed over the clips that start earlier.

    Of those, updates up to the clip's first turn count, but for the ones that the clip repeats: generators begin a clip
    with the last turns of the one before. The earliest clips start from their given state.
    """
    order = sorted(range(len(segments)), key=lambda i: segments[i].first_turn)
    first = segments[order[0]].first_turn
    base: Mapping[str, str] = next((s.given for s in segments if s.first_turn == first and s.given), {})
    states: list[dict[str, str]] = [{}] * len(segments)
    running = dict(base)  # after all updates of earlier clips that lie before this clip's first turn
    known: set[tuple[int, str, str]] = set()
    pending: list[tuple[int, int, str, str]] = []  # heap (frame, order of entry, step id, transition) of the later ones
    entered = count = 0
    for i in order:
        segment = segments[i]
        if segment.first_turn == first:
            states[i] = dict(segment.given or base)
            continue
        while segments[order[entered]].first_turn < segment.first_turn:
            fresh = [update for update in segments[order[entered]].updates if update not in known]
            known.update(fresh)
            for frame, step, transition in fresh:
                heappush(pending, (frame, count, step, transition))
                count += 1
            entered += 1
        while pending and pending[0][0] < segment.first_turn:
            _, _, step, transition = heappop(pending)
            running[step] = TRANSITIONS[transition]
        now = []
        while pending and pending[0][0] == segment.first_turn:
            now.append(heappop(pending))
        own = set(segment.updates) if now else set()
        states[i] = replay(running, ((step, move) for frame, _, step, move in now if (frame, step, move) not in own))
        for update in now:
            heappush(pending, update)
    return states

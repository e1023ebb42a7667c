"""The dialog state that a live model believes in, replayed from its own updates and held against the reference's.

Both start from the state that is known when the clip begins. Joint accuracy asks, at the end of every frame, whether
all steps agree: one missed update counts until the state is right again, so it is shown over the clip's time and
beside a model that never updates. Transitions are matched one to one in the window of the event level, by step and
kind. 0.8 ms a clip of 600 frames.

    F frames of a clip    S its steps    C clips    M matched transitions
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from pipeline.dataset import ClipExample, Turn
from pipeline.schema import TRANSITIONS
from trainer.evaluation.event_metrics import TOLERANCE, Settings, instant, is_event, match, tracked
from trainer.evaluation.frame_metrics import Mask, plain, ratio
from trainer.evaluation.scores import Floats, Ints, ScoredClip, canonical

PARTS: Final = 10  # of a clip's time, in which joint accuracy is shown

State = dict[str, str]  # step id -> state
Change = tuple[int, tuple[str, str]]  # (absolute frame, (step id, transition))


class StateCounts(NamedTuple):
    """One clip's counts, or any sums of them."""

    frames: Any
    right: Any  # frames at whose end all steps agree
    right_never: Any  # the same for a model that never updates
    references: Any  # transitions
    predictions: Any
    matched: Any
    unknown: Any  # predicted transitions of a step or a kind that the clip does not know


@dataclass(frozen=True, eq=False)
class States:
    """What every state metric is computed from."""

    counts: Floats  # [C, len(StateCounts)]
    parts: Ints  # [3, PARTS] frames, right, right_never by part of the clip
    latencies: Floats  # [M] seconds, prediction minus reference
    clips: list[ScoredClip]  # [C] by clip_id


def find_states(clips: Sequence[ScoredClip], settings: Settings) -> States | None:
    """None where the updates are not known, or say nothing (speak+markers), or no clip tells of the state."""
    chosen = [scored for scored in canonical(clips) if tracked(scored.clip)]
    if not chosen or any(scored.updates is None for scored in chosen):
        return None
    made = [update for scored in chosen for update in scored.updates or () if update is not None]
    if made and not any(made):
        return None
    outcomes = [_outcome(scored, settings) for scored in chosen]
    return States(
        counts=np.array([counts for counts, _, _ in outcomes], np.float64),
        parts=np.sum([parts for _, parts, _ in outcomes], axis=0),
        latencies=np.concatenate([late for _, _, late in outcomes]),
        clips=chosen,
    )


# ---- replay ------------------------------------------------------------------------------------------


def changes(clip: ClipExample) -> list[Change]:
    """The reference's transitions by the frame at which they happen, in order; before the clip and after it, too.

    An event of the clip happens at the frame that shows its instant. Other turns happen at their first frame, else
    at their time, else at the next turn's frame: as in the model's prompt, the future never leaks in.
    """
    happens: list[Change] = []
    at = clip.end_frame
    for turn in reversed(clip.turns):
        own = _frame(turn, clip)
        at = at if own is None else own
        happens += [(at, update) for update in reversed(turn.updates)]
    happens.reverse()
    return sorted(happens, key=lambda change: change[0])


def _frame(turn: Turn, clip: ClipExample) -> int | None:
    if is_event(turn, clip):
        return max(clip.start_frame, math.floor(instant(turn, clip) * clip.fps + TOLERANCE))
    if turn.start_frame is not None and turn.end_frame is not None and turn.start_frame < turn.end_frame:
        return turn.start_frame
    return None if turn.time_s is None else math.floor(turn.time_s * clip.fps + TOLERANCE)


def state_at_start(clip: ClipExample) -> State:
    """The state of each step when the clip begins: the initial one, and what happened before its first frame."""
    state = dict.fromkeys((step for step, _ in clip.steps), "not_started") | dict(clip.initial_state)
    for frame, (step, transition) in changes(clip):
        state.setdefault(step, "not_started")
        if frame < clip.start_frame:
            state[step] = TRANSITIONS[transition]
    return state


def replay(clip: ClipExample, made: Iterable[Change]) -> Ints:
    """int64 [F, S]: the state of each known step at the end of every frame, as a code; unknown updates do nothing."""
    start = state_at_start(clip)
    codes = _codes(start)
    steps = {step: i for i, step in enumerate(start)}
    states = np.tile([codes[state] for state in start.values()], (clip.num_frames, 1)).astype(np.int64)
    for frame, (step, transition) in made:
        if step in steps and transition in TRANSITIONS and frame >= clip.start_frame:
            states[frame - clip.start_frame :, steps[step]] = codes[TRANSITIONS[transition]]
    return states


def _codes(start: State) -> dict[str, int]:
    return {state: i for i, state in enumerate(dict.fromkeys([*TRANSITIONS.values(), *start.values()]))}


def made_by(scored: ScoredClip) -> list[Change]:
    """The model's own transitions, in order."""
    assert scored.updates is not None
    return [
        (scored.clip.start_frame + i, update)
        for i, updates in enumerate(scored.updates)
        for update in updates or ()
    ]  # fmt: skip


# ---- counts ------------------------------------------------------------------------------------------


def _outcome(scored: ScoredClip, settings: Settings) -> tuple[StateCounts, Ints, Floats]:
    """(the clip's counts, its frames by part [3, PARTS], the latencies of its matches [M])"""
    clip, made = scored.clip, made_by(scored)
    truth = replay(clip, changes(clip))
    right = (replay(clip, made) == truth).all(1)
    never = (replay(clip, ()) == truth).all(1)
    known = state_at_start(clip)
    unknown = sum(step not in known or transition not in TRANSITIONS for _, (step, transition) in made)
    due, latencies = _match_transitions(clip, made, settings)
    counts = StateCounts(len(right), right.sum(), never.sum(), due, len(made), len(latencies), unknown)
    return counts, _by_part(np.ones_like(right), right, never), latencies


def _match_transitions(clip: ClipExample, made: Sequence[Change], settings: Settings) -> tuple[int, Floats]:
    """(transitions of the reference, latencies of those that the model made, too)"""
    due: dict[tuple[str, str], list[float]] = {}
    for turn in clip.turns:
        if turn.role == "DST_UPDATE" and is_event(turn, clip):
            for update in turn.updates:
                due.setdefault(update, []).append(instant(turn, clip))
    done: dict[tuple[str, str], list[float]] = {}
    for frame, update in made:
        done.setdefault(update, []).append(frame / clip.fps)
    latencies = [np.zeros(0)]
    for update in due:
        reference, predicted = np.sort(due[update]), np.sort(done.get(update, []))
        own, near = match(reference, predicted, settings.early_s, settings.late_s)
        latencies.append(predicted[near] - reference[own])
    return sum(map(len, due.values())), np.concatenate(latencies)


def _by_part(*marked: Mask) -> Ints:
    """int64 [len(marked), PARTS]: how many frames are marked in each of PARTS equal parts of the clip."""
    part = np.arange(len(marked[0])) * PARTS // len(marked[0])
    return np.stack([np.bincount(part[mark], minlength=PARTS) for mark in marked])


# ---- numbers -----------------------------------------------------------------------------------------


def state_rates(c: StateCounts) -> dict[str, Floats]:
    """Joint accuracy and transition precision, recall and F1 from summed counts, elementwise, NaN where undefined."""
    return {
        "joint_accuracy": ratio(c.right, c.frames),
        "joint_accuracy_never_updating": ratio(c.right_never, c.frames),
        "precision": ratio(c.matched, c.predictions),
        "recall": ratio(c.matched, c.references),
        "f1": ratio(2 * c.matched, c.references + c.predictions),
    }


def report_states(states: States) -> dict[str, Any]:
    """Plain numbers, None where undefined."""
    sums = StateCounts(*states.counts.sum(0))
    rates = plain(state_rates(sums))
    frames, right, never = states.parts
    return {
        "clips": len(states.clips),
        "frames": int(sums.frames),
        "joint_accuracy": rates.pop("joint_accuracy"),
        "joint_accuracy_never_updating": rates.pop("joint_accuracy_never_updating"),
        "over_time": _shares(right, frames),
        "over_time_never_updating": _shares(never, frames),
        "transitions": {
            **{name: int(getattr(sums, name)) for name in ("references", "predictions", "matched", "unknown")},
            **rates,
            "median_latency_s": float(np.median(states.latencies)) if len(states.latencies) else None,
        },
    }


def _shares(part: Ints, whole: Ints) -> list[float | None]:
    return [int(a) / int(b) if b else None for a, b in zip(part, whole, strict=True)]

"""State metrics: the dialog state that a free-running model keeps by its own updates, against the reference's.

Both start from the state at the clip's start. Joint accuracy asks at the end of every frame whether all steps agree, so
one missed update counts until the state is right again; it is shown over the clip's time and beside a model that never
updates. Transitions are matched one to one in the window of the event metrics, by step and kind.

    F frames of a clip    S its steps    C clips    M matched transitions
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from pipeline.dataset import ClipExample
from pipeline.schema import STATES, TRANSITIONS
from pipeline.state import NOT_STARTED, replay
from trainer.evaluation.event_metrics import TOLERANCE, Settings, instant, is_event, match, tracked
from trainer.evaluation.frame_metrics import plain, ratio
from trainer.evaluation.scores import Floats, Ints, ScoredClip, canonical

PARTS: Final = 10  # of a clip's time, in which joint accuracy is shown

Change = tuple[int, tuple[str, str]]  # (absolute frame, (step id, transition))


class StateCounts(NamedTuple):
    """One clip's counts, or any sums of them."""

    frames: Any
    right: Any  # frames at whose end all steps agree
    right_never: Any  # the same for a model that never updates
    references: Any  # transitions
    predictions: Any
    matched: Any
    unknown: Any  # predicted transitions of a step or a kind that the clip does not have


@dataclass(frozen=True, eq=False)
class States:
    """What every state metric is computed from."""

    counts: Floats  # [C, len(StateCounts)]
    parts: Ints  # [3, PARTS] frames, right, right_never by part of the clip
    latencies: Floats  # [M] seconds, prediction minus reference
    clips: list[ScoredClip]  # [C] by clip_id


def find_states(clips: Sequence[ScoredClip], settings: Settings) -> States | None:
    """None where the updates are unknown, or all empty (speak+markers), or no clip has a dialog state."""
    chosen = [scored for scored in canonical(clips) if tracked(scored.clip)]
    if not chosen or any(scored.updates is None for scored in chosen):
        return None
    updates = [update for scored in chosen for update in scored.updates or () if update is not None]
    if updates and not any(updates):
        return None
    counts, parts, latencies = zip(*(_count_states(scored, settings) for scored in chosen), strict=True)
    return States(np.array(counts, np.float64), np.sum(parts, axis=0), np.concatenate(latencies), chosen)


# ---- one clip ----------------------------------------------------------------------------------------


def changes(clip: ClipExample) -> list[Change]:
    """The reference's transitions by the frame at which they happen, in order, also those outside the clip.

    An event of the clip happens at the frame that shows its instant. Other turns happen at their first frame, else at
    their time, else at the next turn's frame: as in the model's prompt, the future never leaks in.
    """
    found: list[Change] = []
    at = clip.end_frame
    for turn in reversed(clip.turns):
        if is_event(turn, clip):
            at = max(clip.start_frame, math.floor(instant(turn, clip) * clip.fps + TOLERANCE))
        elif turn.start_frame is not None and turn.end_frame is not None and turn.start_frame < turn.end_frame:
            at = turn.start_frame
        elif turn.time_s is not None:
            at = math.floor(turn.time_s * clip.fps + TOLERANCE)
        found += [(at, update) for update in reversed(turn.updates)]
    return sorted(reversed(found), key=lambda change: change[0])


def state_at_start(clip: ClipExample) -> dict[str, str]:
    """The state of each step when the clip begins: the initial one, and what happened before its first frame."""
    happened = changes(clip)
    steps = [step for step, _ in clip.steps] + [step for _, (step, _) in happened]
    before = [update for frame, update in happened if frame < clip.start_frame]
    return replay(dict.fromkeys(steps, NOT_STARTED) | dict(clip.initial_state), before)


def state_codes(clip: ClipExample, made: Sequence[Change]) -> Ints:
    """int64 [F, S]: the state of each step at the end of every frame as an index into STATES, after the changes `made`.

    Changes before the clip, of unknown steps or of unknown kinds do nothing.
    """
    start = state_at_start(clip)
    column = {step: i for i, step in enumerate(start)}
    codes = np.tile([STATES.index(state) for state in start.values()], (clip.num_frames, 1)).astype(np.int64)
    for frame, (step, transition) in made:
        if step in column and transition in TRANSITIONS and frame >= clip.start_frame:
            codes[frame - clip.start_frame :, column[step]] = STATES.index(TRANSITIONS[transition])
    return codes


def _count_states(scored: ScoredClip, settings: Settings) -> tuple[StateCounts, Ints, Floats]:
    """(the clip's counts, its frames by part [3, PARTS], the latencies of its matches [M])"""
    clip, known = scored.clip, state_at_start(scored.clip)
    made = [(clip.start_frame + i, one) for i, update in enumerate(scored.updates or ()) for one in update or ()]
    truth = state_codes(clip, changes(clip))
    right, never = ((state_codes(clip, given) == truth).all(axis=1) for given in (made, ()))
    due: dict[tuple[str, str], list[float]] = {}
    for turn in clip.turns:
        for update in turn.updates if turn.role == "DST_UPDATE" and is_event(turn, clip) else ():
            due.setdefault(update, []).append(instant(turn, clip))
    latencies = [np.zeros(0)]
    for update, times in due.items():
        reference = np.sort(times)
        predicted = np.sort([frame / clip.fps for frame, given in made if given == update])
        own, near = match(reference, predicted, settings.early_s, settings.late_s)
        latencies.append(predicted[near] - reference[own])
    late = np.concatenate(latencies)
    unknown = sum(step not in known or transition not in TRANSITIONS for _, (step, transition) in made)
    references = sum(map(len, due.values()))
    counts = StateCounts(len(right), right.sum(), never.sum(), references, len(made), len(late), unknown)
    part = np.arange(clip.num_frames) * PARTS // clip.num_frames
    by_part = [np.bincount(part, marked, PARTS).astype(np.int64) for marked in (np.ones_like(right), right, never)]
    return counts, np.stack(by_part), late


# ---- numbers -----------------------------------------------------------------------------------------


def state_rates(counts: Floats) -> dict[str, Any]:
    """Rates from summed counts [..., len(StateCounts)], laid out as in the report; NaN where undefined."""
    c = StateCounts(*np.moveaxis(counts, -1, 0))
    return {
        "joint_accuracy": ratio(c.right, c.frames),
        "joint_accuracy_never_updating": ratio(c.right_never, c.frames),
        "transitions": {
            "precision": ratio(c.matched, c.predictions),
            "recall": ratio(c.matched, c.references),
            "f1": ratio(2 * c.matched, c.references + c.predictions),
        },
    }


def report_states(states: States) -> dict[str, Any]:
    """Plain numbers, None where undefined."""
    sums = states.counts.sum(0)
    rates, c = plain(state_rates(sums)), StateCounts(*sums.astype(int).tolist())
    rates["transitions"] |= {
        "references": c.references,
        "predictions": c.predictions,
        "matched": c.matched,
        "unknown": c.unknown,
        "median_latency_s": float(np.median(states.latencies)) if len(states.latencies) else None,
    }
    frames, right, never = (part.tolist() for part in states.parts)
    return rates | {
        "clips": len(states.clips),
        "frames": c.frames,
        "over_time": [a / b if b else None for a, b in zip(right, frames, strict=True)],
        "over_time_never_updating": [a / b if b else None for a, b in zip(never, frames, strict=True)],
    }

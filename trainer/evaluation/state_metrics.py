"""State metrics: the dialog state that a free-running model keeps by its own updates, against the reference's.

Both start from the state at the clip's start. Joint accuracy asks at the end of every frame whether all steps agree, so
one missed update counts until the state is right again; it is shown over the clip's time and beside a model that never
updates. Transitions are matched one to one in the window of the event metrics, by step and kind; those that `fail` or
`reset` are mistakes.

Beside these stand the metrics of procedure step recognition (IndustReal: Schoonbeek et al., WACV 2024, section 3.2, and
`determine_performance` in PSR/psr_utils.py of github.com/TimSchoonbeek/IndustReal at ad86a35): the F1 of completed
steps, in which an early completion is false and none is too late, and their delay. On 1,000 random cases without an
early or a repeated completion both equal that code's; it pairs some early ones with other steps; here they are false.
Counts are pooled over clips, where theirs are means over recordings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from pipeline.dataset import ClipExample
from pipeline.state import Update, initial_state, replay, replay_frames
from trainer.config import Settings
from trainer.evaluation.event_metrics import TOLERANCE, Counted, instant, is_event, match, tracked
from trainer.evaluation.frame_metrics import plain, ratio
from trainer.evaluation.scores import Floats, ScoredClip

MISTAKES: Final = ("fail", "reset")
PARTS: Final = 10  # of a clip's time, in which joint accuracy is shown


def find_states(clips: Sequence[ScoredClip], settings: Settings) -> Counted | None:
    """None where the updates are unknown, or all empty (speak+markers), or no clip has a dialog state."""
    chosen = [scored for scored in clips if tracked(scored.clip)]
    if not chosen or any(scored.updates is None for scored in chosen):
        return None
    updates = [update for scored in chosen for update in scored.updates or () if update is not None]
    if updates and not any(updates):
        return None
    counted = (_count_states(scored, settings) for scored in chosen)
    return Counted(chosen, *zip(*counted, strict=True))  # type: ignore[arg-type]


def changes(clip: ClipExample) -> list[tuple[int, Update]]:
    """The reference's transitions by the absolute frame at which they happen, in order, also those outside the clip.

    An event of the clip happens at the frame that shows its instant. Other turns happen at their first frame, else at
    their time, else at the next turn's frame: as in the model's prompt, the future never leaks in.
    """
    transitions: list[tuple[int, Update]] = []
    at = clip.end_frame
    for turn in reversed(clip.turns):
        if is_event(turn, clip):
            at = max(clip.start_frame, math.floor(instant(turn, clip) * clip.fps + TOLERANCE))
        elif turn.start_frame is not None and turn.end_frame is not None and turn.start_frame < turn.end_frame:
            at = turn.start_frame
        elif turn.time_s is not None:
            at = math.floor(turn.time_s * clip.fps + TOLERANCE)
        transitions += [(at, update) for update in reversed(turn.updates)]
    transitions.reverse()
    return sorted(transitions, key=lambda change: change[0])


def state_at_start(clip: ClipExample) -> dict[str, str]:
    """The state of each step when the clip begins: the initial one, and what happened before its first frame."""
    happened = changes(clip)
    steps = [step for step, _ in clip.steps] + [step for _, (step, _) in happened]
    before = (update for frame, update in happened if frame < clip.start_frame)
    return replay(initial_state(steps, clip.initial_state), before)


def _count_states(scored: ScoredClip, settings: Settings) -> tuple[dict[str, Any], Floats]:
    """(the clip's counts, the latencies of its matched transitions [M])"""
    clip, start = scored.clip, state_at_start(scored.clip)
    made = [(i, update) for i, updates in enumerate(scored.updates or ()) for update in updates or ()]
    happened = [(frame - clip.start_frame, update) for frame, update in changes(clip) if frame >= clip.start_frame]
    truth, own, never = (replay_frames(start, given, clip.num_frames) for given in (happened, made, ()))
    due = [  # (seconds, first frame from the clip's start, update)
        (instant(turn, clip), max(turn.start_frame or 0, clip.start_frame) - clip.start_frame, update)
        for turn in clip.turns
        for update in (turn.updates if turn.role == "DST_UPDATE" and is_event(turn, clip) else ())
    ]
    latencies = {}
    for update in dict.fromkeys(update for _, _, update in due):
        reference = np.sort([at for at, _, other in due if other == update])
        predicted = np.array([(clip.start_frame + i) / clip.fps for i, other in made if other == update])
        rows, columns = match(reference, predicted, settings.early_s, settings.late_s)
        latencies[update] = predicted[columns] - reference[rows]
    late = np.concatenate([np.zeros(0), *latencies.values()])
    counts = {
        "references": len(due),
        "predictions": len(made),
        "matched": len(late),
        "mistake references": sum(kind in MISTAKES for _, _, (_, kind) in due),
        "mistake predictions": sum(kind in MISTAKES for _, (_, kind) in made),
        "mistake matched": sum(len(of_update) for (_, kind), of_update in latencies.items() if kind in MISTAKES),
    }
    completed = sorted((frame, step) for _, frame, (step, kind) in due if kind == "complete")
    counts |= _count_completions(completed, [(i, step) for i, (step, kind) in made if kind == "complete"], clip.fps)
    part = np.arange(clip.num_frames) * PARTS // clip.num_frames
    for name, marked in (  # frames at whose end all steps agree; the same for a model that never updates
        ("frames", np.ones(clip.num_frames)),
        ("right", (own == truth).all(axis=1)),
        ("right_never", (never == truth).all(axis=1)),
    ):
        counts[name] = marked.sum()
        counts |= {f"{name} {i}": count for i, count in enumerate(np.bincount(part, marked, PARTS))}
    return counts, late


def _count_completions(due: Sequence[tuple[int, str]], made: Sequence[tuple[int, str]], fps: float) -> dict[str, Any]:
    """Counts of procedure step recognition from (frame, step) in order: each reference takes the first prediction of
    its step that is left and not earlier. A step predicted early is no miss, as in IndustReal's code."""
    delays, missed = [], 0
    for step in dict.fromkeys(step for _, step in due):
        own, left = ([i for i, other in side if other == step] for side in (due, made))
        missed += max(0, len(own) - len(left))
        for first in own:  # one is early before its first positive frame, not before its time within the range
            if (late := next((i for i in left if i >= first), None)) is not None:
                left.remove(late)
                delays.append(late - first)
    return {
        "completion references": len(due),
        "completion predictions": len(made),
        "completion matched": len(delays),
        "completion missed": missed,
        "completion seconds late": float(sum(delays)) / fps,
    }


def state_rates(c: dict[str, Any]) -> dict[str, Any]:
    """Rates from summed counts, numbers or arrays; NaN where undefined."""

    def rates(matched: Any, predictions: Any, references: Any) -> dict[str, Any]:
        f1 = ratio(2 * matched, references + predictions)
        return {"precision": ratio(matched, predictions), "recall": ratio(matched, references), "f1": f1}

    done, missed = c["completion matched"], c["completion missed"]
    return {
        "joint_accuracy": ratio(c["right"], c["frames"]),
        "joint_accuracy_never_updating": ratio(c["right_never"], c["frames"]),
        "transitions": rates(c["matched"], c["predictions"], c["references"]),
        "completions": rates(done, c["completion predictions"], done + missed)
        | {"delay_s": ratio(c["completion seconds late"], done)},
        "mistakes": rates(c["mistake matched"], c["mistake predictions"], c["mistake references"]),
    }


def report_states(states: Counted) -> dict[str, Any]:
    """Plain numbers, None where undefined."""
    sums, latencies = states.sums(), np.concatenate(states.latencies)
    rates = plain(state_rates(sums))
    for name, right in (("over_time", "right"), ("over_time_never_updating", "right_never")):
        parts = {str(i): ratio(sums[f"{right} {i}"], sums[f"frames {i}"]) for i in range(PARTS)}
        rates[name] = list(plain(parts).values())
    for kind, prefix in (("transitions", ""), ("completions", "completion "), ("mistakes", "mistake ")):
        rates[kind] |= {name: int(sums[prefix + name]) for name in ("references", "predictions", "matched")}
    rates["transitions"]["median_latency_s"] = float(np.median(latencies)) if len(latencies) else None
    return rates | {"clips": len(states.clips), "frames": int(sums["frames"])}

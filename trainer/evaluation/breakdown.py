"""Event F1 of speaking taken apart: over the width of the matching window, by data set and by task.

A window of w seconds is split into early and late as the settings' own is. The threshold stays the one that was chosen
at the settings' window; the metronome beside it is chosen on val anew at each width. Matches are counted once per clip;
groups sum them by recording.

    C clips by clip_id    W widths    B draws    R recordings of a group    S seeds
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np

from pipeline.dataset import Split
from trainer.config import Settings
from trainer.evaluation.bootstrap import draw_recordings, interval_of
from trainer.evaluation.event_metrics import best_beat, most_matches, predicted_frames, targets_of
from trainer.evaluation.frame_metrics import ratio
from trainer.evaluation.scores import Ints, ScoredClip, canonical

HEAD: Final = "speaking"
WIDTHS: Final = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)  # seconds
MOST_GROUPS: Final = 50  # of a kind, those with most speech


def windows(settings: Settings) -> dict[float, Settings]:
    """Width in seconds -> the settings at that width, ascending; the settings' own among them."""
    own = settings.early_s + settings.late_s
    share = settings.early_s / own if own else 0.5
    made = {w: replace(settings, early_s=w * share, late_s=w * (1 - share)) for w in WIDTHS}
    return dict(sorted((made | {own: settings}).items()))


class Matches(NamedTuple):
    """One run's events on the split."""

    matched: Ints  # [W, C]
    events: Ints  # [C] references and predictions together


def count_matches(clips: Sequence[ScoredClip], threshold: float | None, settings: Settings) -> Matches | None:
    """threshold: a logit; clips that are not free-running have no events without it: None."""
    clips = canonical(clips)
    if threshold is None and any(scored.said is None for scored in clips):
        return None
    fired = [predicted_frames(s, HEAD, threshold, settings.refractory_s) - s.clip.start_frame for s in clips]
    targets = [targets_of([s.clip for s in clips], HEAD, at) for at in windows(settings).values()]
    matched = [[most_matches(t.windows, own) for t, own in zip(of, fired, strict=True)] for of in targets]
    events = [target.references + len(own) for target, own in zip(targets[0], fired, strict=True)]
    return Matches(np.array(matched, np.int64), np.array(events, np.int64))


@cache
def metronomes(test: Split, val: Split | None, settings: Settings) -> dict[float, float | None]:
    """Width -> the event F1 on test of the metronome that is best on val."""
    if val is None:
        return {}
    on_val, on_test = (list(split.in_order()) for split in (val, test))
    beats = {width: (best_beat(on_val, HEAD, at), at) for width, at in windows(settings).items()}
    return {width: beat.f1(on_test, HEAD, at) if beat else None for width, (beat, at) in beats.items()}


def window_rows(
    matches: Mapping[tuple[str, str], Mapping[int, Matches]], settings: Settings, beside: Mapping[float, float | None]
) -> Iterator[dict[str, Any]]:
    """By (rung, mode) and seed: event F1 at each width, with the metronome's."""
    for (rung, mode), of_seeds in matches.items():
        for seed, run in of_seeds.items():
            for (width, at), matched in zip(windows(settings).items(), run.matched.sum(axis=1), strict=True):
                row = {"rung": rung, "seed": seed, "mode": mode, "width_s": width, "early_s": at.early_s}
                f1 = float(ratio(2 * matched, run.events.sum()))
                yield row | {"late_s": at.late_s, "f1": f1, "metronome_f1": beside.get(width)}


def group_rows(
    matches: Mapping[tuple[str, str], Mapping[int, Matches]], split: Split, settings: Settings, draws: int
) -> Iterator[dict[str, Any]]:
    """By data set and by task, (rung, mode): event F1 at the settings' window, with its interval."""
    clips = sorted(split.in_order(), key=lambda clip: clip.clip_id)
    own = [*windows(settings)].index(settings.early_s + settings.late_s)
    speech = np.array([target.references for target in targets_of(clips, HEAD, settings)])
    for by, names in (("dataset", [c.dataset for c in clips]), ("task", [c.goal or "(none given)" for c in clips])):
        members = {name: np.flatnonzero([name == other for other in names]) for name in sorted(set(names))}
        for name in sorted(members, key=lambda name: (-speech[members[name]].sum(), name))[:MOST_GROUPS]:
            group = members[name]
            ids, of_clip = np.unique([clips[i].recording_id for i in group], return_inverse=True)
            weights = np.concatenate([np.ones((1, len(ids)), np.int64), draw_recordings(len(ids), draws)])
            size = {"recordings": len(ids), "events": int(speech[group].sum())}
            for (rung, mode), of_seeds in matches.items():
                counts = [(run.matched[own][group], run.events[group]) for run in of_seeds.values()]
                sums = [[np.bincount(of_clip, of_run, len(ids)) for of_run in pair] for pair in counts]
                f1 = np.stack([ratio(2 * (weights @ matched), weights @ events) for matched, events in sums])
                found = interval_of(f1, len(ids), (0.0, 1.0))
                row = {"by": by, "group": name, "rung": rung, "mode": mode, "seeds": len(counts)} | size
                yield row | {"value": found.value, "low": found.low, "high": found.high}

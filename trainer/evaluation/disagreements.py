"""The few clips on which two arms differ most, as timelines: what stood there, what each arm scored, did and said.

An error is a reference moment that an arm missed, or speech that matches none. Shown are the two clips on which the
first arm makes the most errors fewer than the second, and the two the other way round, so the choice flatters neither.
One seed, the self-fed scores if there are any. Needs the shards that the benchmark used; without them it says so.

    F frames of a clip
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from pipeline.dataset import ClipExample, Split
from pipeline.errors import InputError
from trainer.evaluation.benchmark_folder import Benchmark, sigmoid, why_missing
from trainer.evaluation.event_metrics import Settings, instant, is_event, match, predictions, references
from trainer.evaluation.plots import Timeline, Track, Values
from trainer.evaluation.scores import ScoredClip, read_scores

EACH_WAY: Final = 2  # clips shown that speak for either arm
MOST_S: Final = 240.0  # shown of one clip
LEAD_S: Final = 20.0  # before the first difference, where not all of a clip is shown
MOST_LINES, MOST_TEXT = 40, 200  # of a clip's transcript; characters of one


class Line(NamedTuple):
    """One row of a transcript."""

    seconds: float
    who: str
    text: str


@dataclass(frozen=True)
class Moment:
    picture: Timeline
    lines: list[Line]
    left_out: int  # lines


@dataclass(frozen=True)
class _Outcome:
    """One arm on one clip: instants in seconds."""

    scored: ScoredClip
    hits: Values
    false: Values
    missed: Values

    @property
    def errors(self) -> int:
        return len(self.false) + len(self.missed)


Pair = tuple[_Outcome, _Outcome]


def find_moments(bench: Benchmark, a: str, b: str) -> tuple[list[Moment], str]:
    """(the clips shown, how they were chosen or why there are none) for the benchmark's first seed."""
    missing = [arm for arm in (a, b) if arm not in bench.info["arms"]]
    if missing:
        return [], f"No timelines: {' and '.join(missing)} did not run."
    seed = bench.info["seeds"][0]
    unscored = [f"{arm} was {why}" for arm in (a, b) if (why := why_missing(bench, arm, bench.mode)) is not None]
    if unscored:
        return [], f"No timelines: {'; '.join(unscored)}."
    try:
        split = _same_split(bench)
        outcomes = [_outcomes(bench, arm, seed, split) for arm in (a, b)]
    except (OSError, InputError) as error:
        return [], f"No timelines: {str(error).splitlines()[0]}."
    pairs = list(zip(*outcomes, strict=True))
    shown = _choose(pairs)
    return [_moment(pair, (a, b), bench, seed) for pair in shown], _about(pairs, (a, b), bench.mode, seed)


def _same_split(bench: Benchmark) -> Split:
    """The split that was reported, as it was then; InputError where it is gone or has changed."""
    name, data = str(bench.info["split"]), Path(bench.info["data"])
    split = Split(data, name)
    if split.key != bench.info["data_key"][name]:
        raise InputError(f"{data}: {name} is no longer what was evaluated; run the benchmark again")
    return split


def _outcomes(bench: Benchmark, arm: str, seed: int, split: Split) -> list[_Outcome]:
    threshold = bench.threshold(arm, seed)
    settings = Settings(**{f.name: bench.info["settings"][f.name] for f in fields(Settings)})
    clips = read_scores(bench.scores(arm, seed, bench.mode), {split.name: split})[split.name]
    if threshold is None and any(scored.said is None for scored in clips):
        raise InputError(f"{arm} has no threshold, as val has no frame to speak at")
    return [_outcome(scored, threshold, settings) for scored in clips]


def _outcome(scored: ScoredClip, threshold: float | None, settings: Settings) -> _Outcome:
    wanted = references(scored.clip, "assistant")
    spoken = predictions(scored, "speaking", threshold, settings.refractory_s)
    found, right = match(wanted, spoken, settings.early_s, settings.late_s)
    return _Outcome(scored, spoken[right], np.delete(spoken, right), np.delete(wanted, found))


def _choose(pairs: Sequence[Pair]) -> list[Pair]:
    """Those most in favour of the first arm, then those of the second; of equals, the first by clip_id."""
    ranked = sorted(pairs, key=lambda pair: (pair[0].errors - pair[1].errors, pair[0].scored.clip.clip_id))
    first = [pair for pair in ranked if pair[0].errors < pair[1].errors][:EACH_WAY]
    other = sorted(pairs, key=lambda pair: (pair[1].errors - pair[0].errors, pair[0].scored.clip.clip_id))
    return first + [pair for pair in other if pair[1].errors < pair[0].errors][:EACH_WAY]


def _about(pairs: Sequence[Pair], arms: tuple[str, str], mode: str, seed: int) -> str:
    fewer = sum(first.errors < second.errors for first, second in pairs)
    more = sum(first.errors > second.errors for first, second in pairs)
    told = (
        f"Seed {seed}, {mode}. Errors are reference moments missed and speech that matches none. "
        f"Of {len(pairs):,} clips {arms[0]} makes fewer in {fewer:,}, {arms[1]} in {more:,}; the rest are even."
    )
    if fewer + more:
        told += f" Shown: up to {EACH_WAY} clips with the greatest difference, either way."
    return told


# ---- one clip ----------------------------------------------------------------------------------------


def _moment(pair: Pair, arms: tuple[str, str], bench: Benchmark, seed: int) -> Moment:
    clip = pair[0].scored.clip
    start, end = _section(clip, pair)
    tracks = [
        _track(arm, outcome, bench.threshold(arm, seed), start, end)
        for arm, outcome in zip(arms, pair, strict=True)
    ]  # fmt: skip
    turns = _turns(clip, start, end)
    errors = ", ".join(f"{arm} {outcome.errors}" for arm, outcome in zip(arms, pair, strict=True))
    part = "" if end - start >= clip.num_frames / clip.fps else f" {MOST_S:.0f} s of it are shown."
    picture = Timeline(
        title=f"clip {clip.clip_id}",
        about=f"Recording {clip.recording_id}. Errors: {errors}.{part}",
        start_s=start,
        end_s=end,
        user=[line.seconds for line in turns if line.who == "user"],
        speech=_within(references(clip, "assistant"), start, end),
        updates=_within(references(clip, "DST_UPDATE"), start, end),
        tracks=tracks,
    )
    said = [_said(arm, outcome.scored) for arm, outcome in zip(arms, pair, strict=True)]
    own = [line for lines in said for line in lines if start <= line.seconds <= end]
    lines = sorted([*turns, *own], key=lambda line: line.seconds)
    return Moment(picture, lines[:MOST_LINES], max(0, len(lines) - MOST_LINES))


def _section(clip: ClipExample, pair: Pair) -> tuple[float, float]:
    """Seconds that are shown: the clip, or a stretch of it from shortly before what only one arm got wrong."""
    start, end = clip.start_frame / clip.fps, clip.end_frame / clip.fps
    if end - start <= MOST_S:
        return start, end
    wrong = [set(np.concatenate([outcome.false, outcome.missed]).tolist()) for outcome in pair]
    at = max(start, min(min(wrong[0] ^ wrong[1], default=start) - LEAD_S, end - MOST_S))
    return at, at + MOST_S


def _track(arm: str, outcome: _Outcome, threshold: float | None, start: float, end: float) -> Track:
    scored = outcome.scored
    times = np.arange(scored.clip.start_frame, scored.clip.end_frame) / scored.clip.fps
    seen = (times >= start) & (times <= end)
    updates = [] if scored.updates is None else times[[update is not None for update in scored.updates]].tolist()
    return Track(
        arm=arm,
        times=times[seen],
        scores=sigmoid(scored.logits["speaking"][seen].astype(np.float64)),
        threshold=None if threshold is None else float(sigmoid(np.array(threshold))),
        hits=_within(outcome.hits, start, end),
        false=_within(outcome.false, start, end),
        updates=_within(updates, start, end),
    )


def _within(instants: Any, start: float, end: float) -> list[float]:
    return [float(t) for t in instants if start <= t <= end]


# ---- its transcript ----------------------------------------------------------------------------------

_WHO: Final = {"user": "user", "assistant": "reference", "DST_UPDATE": "reference update"}


def _turns(clip: ClipExample, start: float, end: float) -> list[Line]:
    """The reference's turns in the section."""
    lines = []
    for turn in clip.turns:
        if turn.role == "user" and turn.start_frame is not None:
            at = turn.start_frame / clip.fps
        elif turn.role != "user" and turn.role in _WHO and is_event(turn, clip):
            at = instant(turn, clip)
        else:
            continue
        if start <= at <= end:
            lines.append(Line(at, _WHO[turn.role], _short(turn.text)))
    return lines


def _said(arm: str, scored: ScoredClip) -> list[Line]:
    """What a live arm said and wrote, an update before the speech of its frame."""
    clip, lines = scored.clip, []
    for i in range(clip.num_frames):
        at = (clip.start_frame + i) / clip.fps
        if scored.updates is not None and (update := scored.updates[i]) is not None:
            told = ", ".join(f"{step}->{transition}" for step, transition in update) or "(says nothing)"
            lines.append(Line(at, f"{arm} update", _short(told)))
        if scored.said is not None and (text := scored.said[i]) is not None:
            lines.append(Line(at, arm, _short(text) or "(no words)"))
    return lines


def _short(text: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= MOST_TEXT else text[: MOST_TEXT - 1] + "…"

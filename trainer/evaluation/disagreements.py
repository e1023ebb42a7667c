"""The few clips on which two arms differ most, as timelines with transcripts.

An error is a reference event that an arm missed, or speech that matches none. Shown are the two clips on which the
first arm makes the most errors fewer than the second, and the two the other way round, so the choice favours neither.
One seed; free-running scores if there are any. Needs the shards that the benchmark used; without them it says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from scipy.special import expit

from pipeline.dataset import Split
from pipeline.errors import InputError
from pipeline.state import write_updates
from trainer.config import Settings
from trainer.evaluation.benchmark_folder import Benchmark, why_missing
from trainer.evaluation.event_metrics import instant, is_event, match, predicted_frames, references
from trainer.evaluation.plots import Timeline, Track, printable
from trainer.evaluation.scores import ScoredClip, read_scores

CLIPS_EACH_WAY: Final = 2
MAX_SECONDS: Final = 240.0  # shown of one clip
LEAD_SECONDS: Final = 20.0  # before the first difference, where not all of a clip is shown
MAX_LINES, MAX_CHARACTERS = 40, 200  # of a clip's transcript, and of a line


class TranscriptLine(NamedTuple):
    seconds: float
    who: str
    text: str


class Disagreement(NamedTuple):
    """A clip on which two arms differ."""

    timeline: Timeline
    lines: list[TranscriptLine]
    omitted: int  # lines


class _Outcome(NamedTuple):
    """One arm on one clip; errors are instants in seconds: misses and false alarms."""

    scored: ScoredClip
    track: Track
    errors: set[float]


Pair = tuple[_Outcome, _Outcome]


def find_disagreements(bench: Benchmark, a: str, b: str) -> tuple[list[Disagreement], str]:
    """(the clips shown, how they were chosen or why there are none) for the benchmark's first seed."""
    reasons = [f"{arm} did not run" for arm in (a, b) if arm not in bench.rungs]
    reasons = reasons or [f"{arm} was {why}" for arm in (a, b) if (why := why_missing(bench, arm, bench.mode))]
    if reasons:
        return [], f"No timelines: {'; '.join(reasons)}."
    seed, data = bench.info["seeds"][0], Path(bench.info["data"])
    try:
        split = Split(data, str(bench.info["split"]))
        if split.key != bench.info["data_key"][split.name]:
            raise InputError(f"{data}: {split.name} is no longer what was evaluated; run the benchmark again")
        pairs = list(zip(*(_outcomes(bench, arm, seed, split) for arm in (a, b)), strict=True))
    except (OSError, InputError) as error:
        return [], f"No timelines: {str(error).splitlines()[0]}."
    gains = [(len(second.errors) - len(first.errors), (first, second)) for first, second in pairs]
    gains.sort(key=lambda gained: (-abs(gained[0]), gained[1][0].scored.clip.clip_id))
    better, worse = ([pair for gain, pair in gains if sign * gain > 0] for sign in (1, -1))
    about = (
        f"Seed {seed}, {bench.mode}. Errors are reference events missed and speech that matches none. Of "
        f"{len(pairs):,} clips {a} makes fewer in {len(better):,}, {b} in {len(worse):,}; the rest are even."
    )
    if better or worse:
        about += f" Shown: up to {CLIPS_EACH_WAY} clips with the greatest difference, either way."
    return [_disagreement(pair) for pair in (*better[:CLIPS_EACH_WAY], *worse[:CLIPS_EACH_WAY])], about


def _outcomes(bench: Benchmark, arm: str, seed: int, split: Split) -> Iterator[_Outcome]:
    logit, settings = bench.threshold(arm, seed), Settings(**bench.info["settings"])
    path = bench.run(arm, seed) / "scores" / f"{bench.mode}.parquet"
    for scored in read_scores(path, {split.name: split})[split.name]:
        clip = scored.clip
        if logit is None and scored.said is None:
            raise InputError(f"{arm} has no threshold, as val has no frame to speak at")
        reference = references(clip, "assistant")
        spoken = predicted_frames(scored, "speaking", logit, settings.refractory_s) / scored.clip.fps
        found, right = match(reference, spoken, settings.early_s, settings.late_s)
        false_alarms, misses = np.delete(spoken, right).tolist(), np.delete(reference, found).tolist()
        times = np.arange(clip.start_frame, clip.end_frame) / clip.fps
        updates = [t for t, update in zip(times.tolist(), scored.updates or (), strict=False) if update is not None]
        scores = expit(scored.logits["speaking"].astype(np.float64))
        threshold = None if logit is None else float(expit(logit))
        track = Track(arm, times, scores, threshold, spoken[right].tolist(), false_alarms, updates)
        yield _Outcome(scored, track, {*false_alarms, *misses})


def _disagreement(pair: Pair) -> Disagreement:
    clip = pair[0].scored.clip
    start, end = clip.start_frame / clip.fps, clip.end_frame / clip.fps
    subtitle = f"Recording {clip.recording_id}. Errors: "
    subtitle += ", ".join(f"{outcome.track.rung} {len(outcome.errors)}" for outcome in pair) + "."
    if end - start > MAX_SECONDS:  # a stretch from shortly before what only one arm got wrong
        first = min(pair[0].errors ^ pair[1].errors, default=start)
        start = max(start, min(first - LEAD_SECONDS, end - MAX_SECONDS))
        end = start + MAX_SECONDS
        subtitle += f" {MAX_SECONDS:.0f} s of it are shown."
    turns = list(_transcript(pair))
    lines = sorted((line for line in turns if start <= line.seconds <= end), key=lambda line: line.seconds)
    timeline = Timeline(
        title=f"clip {clip.clip_id}",
        subtitle=subtitle,
        span=(start, end),
        user=[line.seconds for line in turns if line.who == "user"],
        speech=references(clip, "assistant").tolist(),
        updates=references(clip, "DST_UPDATE").tolist(),
        tracks=[outcome.track for outcome in pair],
    )
    return Disagreement(timeline, lines[:MAX_LINES], max(0, len(lines) - MAX_LINES))


def _transcript(pair: Pair) -> Iterator[TranscriptLine]:
    """The reference's lines, then what each free-running arm wrote, an update before the speech of its frame."""
    clip, names = pair[0].scored.clip, {"assistant": "reference", "DST_UPDATE": "reference update"}
    for turn in clip.turns:
        if turn.role == "user" and turn.start_frame is not None:
            yield TranscriptLine(turn.start_frame / clip.fps, "user", printable(turn.text, MAX_CHARACTERS))
        elif turn.role in names and is_event(turn, clip):
            yield TranscriptLine(instant(turn, clip), names[turn.role], printable(turn.text, MAX_CHARACTERS))
    for scored, track, _ in pair:
        nothing = [None] * clip.num_frames
        written = zip(track.times.tolist(), scored.said or nothing, scored.updates or nothing, strict=True)
        for time, said, update in written:
            if update is not None:
                text = write_updates(update) or "(empty)"
                yield TranscriptLine(time, f"{track.rung} update", printable(text, MAX_CHARACTERS))
            if said is not None:
                yield TranscriptLine(time, track.rung, printable(said, MAX_CHARACTERS) or "(no words)")

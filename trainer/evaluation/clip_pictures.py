"""Single held-out clips: the busiest with the scores of both heads, and those on which two arms differ most.

The first is the demo's picture; its scores are sigmoid(logit), not corrected for the negative rate of training. The
others are the report's timelines: an error is a reference event that an arm missed, or speech
that matches none; shown are the two clips on which the first arm makes the most errors fewer than the second, and the
two the other way round, so the choice favours neither.

    F frames of the clip
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from rich.text import Text
from scipy.special import expit

from pipeline.dataset import Split
from pipeline.errors import InputError
from pipeline.media import find_frames, fit, open_pictures
from pipeline.schema import HEAD_TITLES, HEADS
from pipeline.state import write_updates
from pipeline.summary import HUES
from pipeline.terminal import clock, plain
from pipeline.timeline import find_clip
from trainer.config import Settings
from trainer.evaluation.benchmark_folder import Benchmark, why_missing
from trainer.evaluation.event_metrics import instant, is_event, match, predicted_frames, references
from trainer.evaluation.metrics import value_at
from trainer.evaluation.plots import DST, MUTED, SPEAKING, Timeline, Track, Values, new_figure, printable, render
from trainer.evaluation.scores import ScoredClip, read_scores

COLOURS: Final = {"speaking": SPEAKING, "DST": DST, "assistant": SPEAKING, "DST_UPDATE": DST}
MAX_THUMBNAILS, THUMBNAIL_SIDE, MAX_TURNS = 40, 48, 14
CLIPS_EACH_WAY: Final = 2
MAX_SECONDS: Final = 240.0  # shown of one clip
LEAD_SECONDS: Final = 20.0  # before the first difference, where not all of a clip is shown
MAX_CHARACTERS: Final = 200  # of a line of a transcript


# ---- one clip, both heads ----------------------------------------------------------------------------


class HeldOutClip(NamedTuple):
    """A clip with its scores, float [F] in 0..1, and labels, int8 [F], by the titles in HEAD_TITLES."""

    row: dict[str, Any]  # of the clips table
    scores: dict[str, Values]
    labels: dict[str, np.ndarray]


def busiest_clip(folder: Path, scores: Path, split: str) -> HeldOutClip:
    """The clip of a scores file with the most positive frames of both heads; the first of equals."""
    table = pl.scan_parquet(scores, glob=False).filter(pl.col("split") == split)
    speaking, updates = ((pl.col(f"{head}_label") == 1).sum() for head in HEADS)
    rank = pl.min_horizontal(speaking, updates) * 1000 + speaking + updates
    ranked = table.group_by("clip_id", maintain_order=True).agg(rank=rank).collect()
    clip_id = ranked.row(int(ranked["rank"].arg_max() or 0))[0]
    frames = table.filter(pl.col("clip_id") == clip_id).sort("frame").collect()
    return HeldOutClip(
        find_clip(folder, f"{split}:{clip_id}").row,
        {name: expit(frames[f"{head}_logit"].to_numpy().astype(np.float64)) for head, name in HEAD_TITLES.items()},
        {name: frames[f"{head}_label"].to_numpy() for head, name in HEAD_TITLES.items()},
    )


def blocks(clip: HeldOutClip, columns: int = 88) -> Iterator[Text]:
    """Per head one row of scores as blocks and one of the labels, for the clip's first `columns` frames."""
    yield Text(f"held-out clip {plain(clip.row['clip_id'])}: score per frame, and below it the label", "dim")
    for head, score in clip.scores.items():
        heights = np.clip((score[:columns] * 8).round().astype(int), 0, 8).tolist()
        labels = "".join("█" if label == 1 else "·" for label in clip.labels[head][:columns].tolist())
        yield Text.assemble((f"{head:>9} {''.join(' ▁▂▃▄▅▆▇█'[height] for height in heights)}", HUES[head]))
        yield Text(f"{'label':>9} {labels}", "dim")


def render_clip(clip: HeldOutClip, frames_root: Path, captions: dict[str, str], title: str) -> str:
    """The SVG; `captions` stand beside each head's name, e.g. 'AP 0.99, chance 0.12'."""
    return render(lambda: _make_figure(clip, frames_root, captions, title))[0]


def _make_figure(clip: HeldOutClip, frames_root: Path, captions: dict[str, str], title: str) -> Figure:
    row = clip.row
    by_frame: dict[tuple[int, str], list[str]] = {}  # the texts of one frame and role stand in one line
    for turn in row["turns"]:
        start = turn["start_frame"]
        if turn["role"] != "system" and start is not None and row["start_frame"] <= start < row["end_frame"]:
            by_frame.setdefault((start, turn["role"]), []).append(plain(turn["text"]))
    turns = list(by_frame.items())[:MAX_TURNS]
    heights = [30, *[100] * len(clip.scores), 22 * len(turns)]
    figure = new_figure(sum(heights) + 170, width=1200)
    pictures, *panels, texts = figure.subplots(len(heights), height_ratios=heights)
    figure.suptitle(title, x=0.02, ha="left", size=19, weight="bold")
    about = "not seen in training. Line: the head's score at each frame. Band: frames labelled positive."
    pictures.set_title(f"clip {printable(row['clip_id'], 60)}, {about}", size=13, weight="normal", color=MUTED)
    if path := find_frames(frames_root, row["video_uid"], row["frames_file"], row["dataset"]):
        which = np.linspace(0, row["num_frames"] - 1, min(row["num_frames"], MAX_THUMBNAILS)).round().astype(int)
        numbers = (row["start_frame"] + which).tolist()
        with closing(open_pictures(path)) as opened:
            images = [fit(opened.image(number, row["fps"]), THUMBNAIL_SIDE).transpose(1, 2, 0) for number in numbers]
        pictures.imshow(np.concatenate(images, axis=1), extent=(0, 1, 0, 1), aspect="auto")
    pictures.set_axis_off()
    edges = (row["start_frame"] + np.arange(row["num_frames"] + 1)) / row["fps"]
    for axes, (head, score) in zip(panels, clip.scores.items(), strict=True):
        axes.set_title(head, color=COLOURS[head], size=14)
        axes.set_title(captions[head], loc="right", size=13, weight="normal", color=MUTED)
        axes.stairs(clip.labels[head] == 1, edges, fill=True, color=COLOURS[head], alpha=0.22)
        axes.stairs(score, edges, baseline=None, color=COLOURS[head], linewidth=2, clip_on=False)
        axes.set(ylim=(0, 1), yticks=[0, 0.5, 1], xlim=(edges[0], edges[-1]))
        axes.set_xticks(edges[:: max(1, round(row["num_frames"] / 10))])
        axes.xaxis.set_major_formatter(lambda second, _: clock(second))
    texts.set_axis_off()
    texts.set_ylim(max(1, len(turns)), 0)
    style: dict[str, Any] = {"size": 13, "va": "top", "transform": texts.get_yaxis_transform()}
    for y, ((frame, role), lines) in enumerate(turns):
        texts.text(0.045, y, clock(frame / row["fps"], tenths=True), ha="right", color=MUTED, **style)
        texts.text(0.055, y, role, color=COLOURS.get(role, MUTED), **style)
        texts.text(0.16, y, printable(", ".join(lines), 140), **style)
    return figure


# ---- where two arms differ ---------------------------------------------------------------------------


class TranscriptLine(NamedTuple):
    seconds: float
    who: str
    text: str


class _Outcome(NamedTuple):
    """One arm on one clip; errors are instants in seconds: misses and false alarms."""

    scored: ScoredClip
    track: Track
    errors: set[float]


Pair = tuple[_Outcome, _Outcome]
Disagreement = tuple[Timeline, list[TranscriptLine]]


def find_disagreements(bench: Benchmark, a: str, b: str) -> tuple[list[Disagreement], str]:
    """(the clips shown, how they were chosen or why there are none) for the benchmark's first seed.

    Free-running scores if there are any. Needs the shards that the benchmark used.
    """
    for arm in (a, b):
        if why := why_missing(bench, arm, bench.mode) if arm in bench.rungs else "not run":
            return [], f"No timelines: {arm} was {why}."
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
    settings, path = Settings(**bench.info["settings"]), bench.run(arm, seed) / "scores" / f"{bench.mode}.parquet"
    logit = value_at(bench.metrics[arm, seed], "thresholds.event.speaking")
    if logit is None:
        raise InputError(f"{arm} has no threshold, as val has no frame to speak at")
    for scored in read_scores(path, {split.name: split})[split.name]:
        clip, reference = scored.clip, references(scored.clip, "assistant")
        spoken = predicted_frames(scored, "speaking", logit, settings.refractory_s) / clip.fps
        found, right = match(reference, spoken, settings.early_s, settings.late_s)
        false_alarms, misses = np.delete(spoken, right).tolist(), np.delete(reference, found).tolist()
        times = np.arange(clip.start_frame, clip.end_frame) / clip.fps
        updates = [t for t, update in zip(times.tolist(), scored.updates or (), strict=False) if update is not None]
        scores = expit(scored.logits["speaking"].astype(np.float64))
        track = Track(arm, times, scores, float(expit(logit)), spoken[right].tolist(), false_alarms, updates)
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
    lines = sorted(_transcript(pair), key=lambda line: line.seconds)
    timeline = Timeline(
        title=f"clip {clip.clip_id}",
        subtitle=subtitle,
        span=(start, end),
        user=[line.seconds for line in lines if line.who == "user"],
        speech=references(clip, "assistant").tolist(),
        updates=references(clip, "DST_UPDATE").tolist(),
        tracks=[outcome.track for outcome in pair],
    )
    return timeline, [line for line in lines if start <= line.seconds <= end]


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

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
from matplotlib.lines import Line2D
from scipy.special import expit

from pipeline.dataset import ClipExample, Split
from pipeline.errors import InputError
from pipeline.media import find_frames, fit, open_pictures
from pipeline.schema import HEAD_TITLES, HEADS
from pipeline.state import write_updates
from pipeline.terminal import clock, plain
from pipeline.timeline import find_clip
from trainer.config import Settings
from trainer.evaluation import plots
from trainer.evaluation.comparison import Benchmark, why_missing
from trainer.evaluation.event_metrics import instant, is_event, match, predicted_frames, references
from trainer.evaluation.metrics import value_at
from trainer.evaluation.scores import ScoredClip, read_scores

COLOURS: Final = {"speaking": plots.SPEAKING, "DST": plots.DST, "assistant": plots.SPEAKING, "DST_UPDATE": plots.DST}
MAX_THUMBNAILS, THUMBNAIL_SIDE, MAX_TURNS = 40, 48, 14
CLIPS_EACH_WAY: Final = 2
MAX_SECONDS: Final = 240.0  # shown of one clip
LEAD_SECONDS: Final = 20.0  # before the first difference, where not all of a clip is shown
MAX_CHARACTERS: Final = 200  # of a line of a transcript


# ---- one clip, both heads ----------------------------------------------------------------------------


def render_busiest_clip(
    data: Path, scores: Path, split: str, frames_root: Path, captions: dict[str, str], title: str
) -> str:
    """The SVG of the clip of a scores file with the most positive frames of both heads; the first of equals.

    captions: what stands beside each head's name, by the titles in HEAD_TITLES.
    """
    table = pl.scan_parquet(scores, glob=False).filter(pl.col("split") == split)
    speaking, updates = ((pl.col(f"{head}_label") == 1).sum() for head in HEADS)
    rank = pl.min_horizontal(speaking, updates) * 1000 + speaking + updates
    ranked = table.group_by("clip_id", maintain_order=True).agg(rank=rank).collect()
    clip_id = ranked.row(int(ranked["rank"].arg_max() or 0))[0]
    frames = table.filter(pl.col("clip_id") == clip_id).sort("frame").collect()
    _, clip = find_clip(data, f"{split}:{clip_id}")
    return plots.render(lambda: _make_figure(clip, frames, frames_root, captions, title))[0]


def _make_figure(
    clip: ClipExample, scored: pl.DataFrame, frames_root: Path, captions: dict[str, str], title: str
) -> Figure:
    """scored: the clip's rows of the scores file."""
    by_frame: dict[tuple[int, str], list[str]] = {}  # the texts of one frame and role stand in one line
    for turn in clip.turns:
        start = turn.start_frame
        if turn.role != "system" and start is not None and clip.start_frame <= start < clip.end_frame:
            by_frame.setdefault((start, turn.role), []).append(plain(turn.text))
    turns = list(by_frame.items())[:MAX_TURNS]
    heights = [30, *[100] * len(HEADS), 22 * len(turns)]
    figure = plots.new_figure(sum(heights) + 170, width=1200)
    pictures, *panels, texts = figure.subplots(len(heights), height_ratios=heights)
    figure.suptitle(title, x=0.02, ha="left", size=19, weight="bold")
    subtitle = "not seen in training. Line: the head's score at each frame. Band: frames labelled positive."
    subtitle = f"clip {plots.printable(clip.clip_id, 60)}, {subtitle}"
    pictures.set_title(subtitle, size=13, weight="normal", color=plots.MUTED)
    if path := find_frames(frames_root, clip.video_uid, clip.frames_file, clip.dataset):
        which = np.linspace(0, clip.num_frames - 1, min(clip.num_frames, MAX_THUMBNAILS)).round().astype(int)
        numbers = (clip.start_frame + which).tolist()
        with closing(open_pictures(path)) as opened:
            images = [fit(opened.image(number, clip.fps), THUMBNAIL_SIDE).transpose(1, 2, 0) for number in numbers]
        pictures.imshow(np.concatenate(images, axis=1), extent=(0, 1, 0, 1), aspect="auto")
    pictures.set_axis_off()
    edges = (clip.start_frame + np.arange(clip.num_frames + 1)) / clip.fps
    for axes, (head, name) in zip(panels, HEAD_TITLES.items(), strict=True):
        axes.set_title(name, color=COLOURS[name], size=14)
        axes.set_title(captions[name], loc="right", size=13, weight="normal", color=plots.MUTED)
        scores = expit(scored[f"{head}_logit"].to_numpy().astype(np.float64))
        axes.stairs(scored[f"{head}_label"].to_numpy() == 1, edges, fill=True, color=COLOURS[name], alpha=0.22)
        axes.stairs(scores, edges, baseline=None, color=COLOURS[name], linewidth=2, clip_on=False)
        axes.set(ylim=(0, 1), yticks=[0, 0.5, 1], xlim=(edges[0], edges[-1]))
        axes.set_xticks(edges[:: max(1, round(clip.num_frames / 10))])
        axes.xaxis.set_major_formatter(lambda second, _: clock(second))
    texts.set_axis_off()
    texts.set_ylim(max(1, len(turns)), 0)
    style: dict[str, Any] = {"size": 13, "va": "top", "transform": texts.get_yaxis_transform()}
    for y, ((frame, role), lines) in enumerate(turns):
        texts.text(0.045, y, clock(frame / clip.fps, tenths=True), ha="right", color=plots.MUTED, **style)
        texts.text(0.055, y, role, color=COLOURS.get(role, plots.MUTED), **style)
        texts.text(0.16, y, plots.printable(", ".join(lines), 140), **style)
    return figure


# ---- where two arms differ ---------------------------------------------------------------------------


class Outcome(NamedTuple):
    """One arm on one clip; instants in seconds of the video."""

    arm: str
    scored: ScoredClip
    threshold: float  # a logit
    hits: list[float]  # speech matched to a reference event
    false_alarms: list[float]  # other speech
    errors: set[float]  # false alarms and misses


class TranscriptLine(NamedTuple):
    seconds: float
    who: str
    text: str


class Disagreement(NamedTuple):
    """A clip on which two arms differ."""

    clip: ClipExample
    outcomes: tuple[Outcome, Outcome]
    span: tuple[float, float]  # seconds that are shown
    lines: list[TranscriptLine]  # of that span


def find_disagreements(bench: Benchmark) -> tuple[list[Disagreement], str]:
    """(the clips shown, how they were chosen or why there are none) for the question's arms and the first seed.

    Free-running scores if there are any. Needs the shards that the benchmark used.
    """
    a, b = bench.pair
    for arm in bench.pair:
        if why := why_missing(bench, arm, bench.mode) if arm in bench.rungs else "not run":
            return [], f"No timelines: {arm} was {why}."
    seed, data = bench.info["seeds"][0], Path(bench.info["data"])
    try:
        split = Split(data, str(bench.info["split"]))
        pairs = list(zip(*(_outcomes(bench, arm, seed, split) for arm in bench.pair), strict=True))
    except (OSError, InputError) as error:
        return [], f"No timelines: {str(error).splitlines()[0]}."
    gains = [(len(second.errors) - len(first.errors), (first, second)) for first, second in pairs]
    gains.sort(key=lambda gained: (-abs(gained[0]), gained[1][0].scored.clip.clip_id))
    better, worse = ([pair for gain, pair in gains if sign * gain > 0] for sign in (1, -1))
    summary = (
        f"Seed {seed}, {bench.mode}. Errors are reference events missed and speech that matches none. Of "
        f"{len(pairs):,} clips {a} makes fewer in {len(better):,}, {b} in {len(worse):,}; the rest are even."
    )
    if better or worse:
        summary += f" Shown: up to {CLIPS_EACH_WAY} clips with the greatest difference, either way."
    return [_disagreement(pair) for pair in (*better[:CLIPS_EACH_WAY], *worse[:CLIPS_EACH_WAY])], summary


def _outcomes(bench: Benchmark, arm: str, seed: int, split: Split) -> Iterator[Outcome]:
    settings, path = Settings(**bench.info["settings"]), bench.run(arm, seed) / "scores" / f"{bench.mode}.parquet"
    logit = value_at(bench.metrics[arm, seed], "thresholds.event.speaking")
    if logit is None:
        raise InputError(f"{arm} has no threshold, as val has no frame to speak at")
    for scored in read_scores(path, {split.name: split})[split.name]:
        reference = references(scored.clip, "assistant")
        spoken = predicted_frames(scored, "speaking", logit, settings.refractory_s) / scored.clip.fps
        matched, right = match(reference, spoken, settings.early_s, settings.late_s)
        false_alarms, misses = np.delete(spoken, right).tolist(), np.delete(reference, matched).tolist()
        yield Outcome(arm, scored, logit, spoken[right].tolist(), false_alarms, {*false_alarms, *misses})


def _disagreement(pair: tuple[Outcome, Outcome]) -> Disagreement:
    """All of the clip, or a stretch from shortly before what only one arm got wrong."""
    clip = pair[0].scored.clip
    start, end = clip.start_frame / clip.fps, clip.end_frame / clip.fps
    if end - start > MAX_SECONDS:
        first = min(pair[0].errors ^ pair[1].errors, default=start)
        start = max(start, min(first - LEAD_SECONDS, end - MAX_SECONDS))
        end = start + MAX_SECONDS
    lines = sorted(_transcript(pair), key=lambda line: line.seconds)
    return Disagreement(clip, pair, (start, end), [line for line in lines if start <= line.seconds <= end])


def _transcript(pair: tuple[Outcome, Outcome]) -> Iterator[TranscriptLine]:
    """The reference's lines, then what each free-running arm wrote, an update before the speech of its frame."""
    clip, names = pair[0].scored.clip, {"assistant": "reference", "DST_UPDATE": "reference update"}
    for turn in clip.turns:
        if turn.role == "user" and turn.start_frame is not None:
            yield TranscriptLine(turn.start_frame / clip.fps, "user", plots.printable(turn.text, MAX_CHARACTERS))
        elif turn.role in names and is_event(turn, clip):
            yield TranscriptLine(instant(turn, clip), names[turn.role], plots.printable(turn.text, MAX_CHARACTERS))
    for outcome in pair:
        nothing, scored = [None] * clip.num_frames, outcome.scored
        times = (np.arange(clip.start_frame, clip.end_frame) / clip.fps).tolist()
        written = zip(times, scored.said or nothing, scored.updates or nothing, strict=True)
        for time, said, update in written:
            if update is not None:
                text = write_updates(update) or "(empty)"
                yield TranscriptLine(time, f"{outcome.arm} update", plots.printable(text, MAX_CHARACTERS))
            if said is not None:
                yield TranscriptLine(time, outcome.arm, plots.printable(said, MAX_CHARACTERS) or "(no words)")


def timeline(shown: Disagreement) -> Figure:
    """The reference in three lanes; below it each arm's score, where it spoke, and where it wrote an update."""
    clip, (start, end) = shown.clip, shown.span
    times = np.arange(clip.start_frame, clip.end_frame) / clip.fps
    figure = plots.new_figure(150 + 126 * 2)
    lanes, *panels = figure.subplots(3, sharex=True, height_ratios=[55, 84, 84])
    lanes.set_title(f"{plots.printable(f'clip {clip.clip_id}', 70)}\n", pad=4)
    errors = ", ".join(f"{outcome.arm} {len(outcome.errors)}" for outcome in shown.outcomes)
    subtitle = f"Recording {clip.recording_id}. Errors: {errors}."
    subtitle += f" {MAX_SECONDS:.0f} s of it are shown." if clip.num_frames / clip.fps > MAX_SECONDS else ""
    lanes.text(0, 1.12, plots.printable(subtitle, 120), transform=lanes.transAxes, size=11.5, color=plots.MUTED)
    speech = references(clip, "assistant").tolist()
    users = [turn.start_frame / clip.fps for turn in clip.turns if turn.role == "user" and turn.start_frame is not None]
    events = {"user": ("v", plots.MUTED, users), "reference speech": ("o", plots.INK, speech)}
    events["reference update"] = ("d", plots.DST, references(clip, "DST_UPDATE").tolist())
    for y, (marker, colour, instants) in enumerate(events.values()):
        lanes.plot(instants, [y] * len(instants), marker, color=colour, markersize=6.5)
    lanes.set_yticks(range(len(events)), list(events))
    lanes.set_ylim(2.6, -0.6)
    for axes, (arm, scored, threshold, hits, false_alarms, _) in zip(panels, shown.outcomes, strict=True):
        colour = plots.RUNG_STYLES[arm].colour
        axes.set_title(" ", size=12)  # room for the marks above the axes
        axes.set(ylim=(-0.16, 1.06), yticks=[0, 0.5, 1])
        axes.set_ylabel(plots.printable(arm, 18), rotation=0, ha="right", color=colour, size=12, weight="bold")
        scores = expit(scored.logits["speaking"].astype(np.float64))
        axes.plot(*plots.thin(times, scores), color=colour, linewidth=1.3)
        axes.axhline(float(expit(threshold)), color=colour, linewidth=0.9, linestyle=plots.DASHED, alpha=0.8)
        for instants, marker, shade in ((hits, "o", colour), (false_alarms, "x", plots.FALSE_ALARM)):
            within = [t for t in instants if start <= t <= end]
            axes.plot(within, [1.14] * len(within), marker, color=shade, transform=axes.get_xaxis_transform(),
                      markersize=6.5, markeredgewidth=1.8, clip_on=False, in_layout=False)  # fmt: skip
        updates = [t for t, update in zip(times, scored.updates or (), strict=False) if update is not None]
        axes.plot(updates, [-0.08] * len(updates), "d", color=plots.DST, markersize=5.5)
    pad = 0.01 * (end - start)
    for axes in (lanes, *panels):
        axes.grid(visible=False)
        axes.set_xlim(start - pad, end + pad)
        for at in speech:
            axes.axvline(at, color=plots.GRID, linewidth=1.2, zorder=0)
    panels[-1].set_xlabel("seconds of the video")
    points = (("o", plots.INK, "hit"), ("x", plots.FALSE_ALARM, "false alarm"), ("d", plots.DST, "its update"))
    lines: tuple[tuple[Any, str], ...] = (("-", "score"), (plots.DASHED, "threshold"))
    handles = [Line2D([], [], color=c, marker=m, linestyle="", markersize=6.5, label=name) for m, c, name in points]
    handles += [Line2D([], [], color=plots.MUTED, linestyle=style, label=name) for style, name in lines]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, labelcolor=plots.MUTED, handlelength=1)
    return figure

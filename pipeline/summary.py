"""The short table per split that `preprocess` ends with and `inspect` shows again: numbers in, table out.

The numbers come from the manifest (`summary_of`), or from the shards themselves (`inspect.summarise`); both must
agree, which a test holds them to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline import hazards
from pipeline.terminal import percent, plain

HEADS: Final = {"speaking": "speaking_label", "DST": "dst_update_label"}
HUES: Final = {"speaking": "dodger_blue1", "DST": "dark_orange"}


@dataclass(frozen=True, slots=True)
class Head:
    """One head's labels in one split; clips that say nothing about the head are left out."""

    positives: int
    frames: int  # before sampling: all frames of those clips
    supervised: int  # after sampling: frames with a 0 or a 1
    clips: int
    first: int  # clips whose first frame is positive
    gaps: dict[float, int]  # quiet seconds between two events of a clip -> how often
    usual_gap: tuple[float, int, int] = (0.0, 0, 0)  # the most frequent of them, how often, of how many

    @property
    def before(self) -> float:
        return self.positives / self.frames if self.frames else 0.0

    @property
    def after(self) -> float:
        return self.positives / self.supervised if self.supervised else 0.0

    @property
    def median_gap(self) -> float | None:
        return weighted_median(self.gaps)


@dataclass(frozen=True, slots=True)
class Split:
    """One split. The five cells add up to `frames`; `silence` is supervised for at least one head."""

    name: str
    clips: int
    recordings: int
    frames: int
    hours: float
    speak_only: int
    dst_only: int
    both: int
    silence: int
    not_sampled: int
    first: int  # clips whose first frame is positive for either head
    heads: dict[str, Head]  # by the names in HEADS
    rates: list[float]  # distinct negative rates, ascending
    conventions: list[str]
    positive: list[str]

    @property
    def supervised(self) -> float:
        return 1 - self.not_sampled / self.frames if self.frames else 0.0


@dataclass(frozen=True, slots=True)
class Summary:
    splits: list[Split]
    recordings: int  # distinct, over all splits
    hazards: list[dict[str, str]]  # name, split, text: those the shards themselves can show


def weighted_median(counts: Mapping[float, int]) -> float | None:
    """Lower median of values given as value -> count; None of nothing."""
    half, seen = (sum(counts.values()) + 1) // 2, 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= half:
            return value
    return None


def summary_of(manifest: Mapping[str, Any]) -> Summary:
    """The same summary from the counts that `preprocess` put into the manifest, but for the gaps."""
    splits = []
    for name, told in manifest["splits"].items():
        heads = {}
        for head, key in (("speaking", "speaking"), ("DST", "dst_update")):
            frames, supervised = told[f"{key}_frames"], told[f"{key}_supervised"]
            heads[head] = Head(
                told[f"{key}_positive"],
                frames,
                supervised,
                told[f"{key}_clips"],
                0,
                {},
                tuple(told[f"{key}_usual_gap"]),
            )
        both = told["both_positive"]
        only = [head.positives - both for head in heads.values()]
        splits.append(
            Split(
                name=name,
                clips=told["clips"],
                recordings=told["recordings"],
                frames=told["frames"],
                hours=told["hours"],
                speak_only=only[0],
                dst_only=only[1],
                both=both,
                silence=told["supervised"] - both - sum(only),
                not_sampled=told["frames"] - told["supervised"],
                first=told["first_frame_positive"],
                heads=heads,
                rates=[],
                conventions=[],
                positive=[],
            )
        )
    splits.sort(key=lambda split: split_order(split.name))
    return Summary(splits, 0, [])


def split_order(name: str) -> tuple[int, str]:
    """Sort key of splits: train, val, test first, then others by name."""
    return {"train": 0, "val": 1, "test": 2}.get(name, 3), name


def label_hazards(split: Split) -> list[hazards.Hazard]:
    """What the split's label counts warn of."""
    heads = {n: hazards.HeadCounts(h.clips, h.frames, h.positives, h.usual_gap) for n, h in split.heads.items()}
    counts = hazards.LabelCounts(split.clips, split.first, split.both, heads)
    return list(hazards.of_labels(split.name, counts))


def all_hazards(summary: Summary, manifest: Mapping[str, Any]) -> list[hazards.Hazard]:
    """The manifest's hazards (some need the inputs) and what the shards show beyond them, by split."""
    told = [*(manifest.get("hazards") or []), *summary.hazards]
    return hazards.merged(told, [split.name for split in summary.splits])


# ---- the table ---------------------------------------------------------------------------------------


def render_summary(summary: Summary, manifest: Mapping[str, Any]) -> RenderableType:
    """A table (one column per split), then the inputs and hazards the manifest tells of; 100 columns wide."""
    tables = [_table(summary.splits[i : i + 5], manifest) for i in range(0, len(summary.splits), 5)]
    lines = [*_input_lines(manifest), *_hazard_lines(all_hazards(summary, manifest))]
    return Group(*tables, *([Text(""), *lines] if lines else []))


def _table(splits: list[Split], manifest: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    for split in splits:
        table.add_column(Text(plain(split.name)), justify="right")
    columns = [list(_cells(split)) for split in splits]
    for row in zip(*columns, strict=True):
        label, section, style = row[0][0], row[0][2], row[0][3]
        table.add_row(Text(label, style=style), *[value for _, value, *_ in row], end_section=section)
    for reason, counts in drops_by_reason(splits, manifest).items():
        table.add_row(Text(f"dropped: {plain(reason)}"), *[f"{n:,}" if n else "-" for n in counts])
    return table


def _cells(split: Split) -> Iterator[tuple[str, str, bool, str]]:
    """(label, value, whether a rule follows, style) down one split's column."""
    yield "clips", f"{split.clips:,}", False, ""
    yield "recordings", f"{split.recordings:,}", False, ""
    yield "frames", f"{split.frames:,}", False, ""
    yield "hours", f"{split.hours:,.2f}", False, ""
    yield "supervised frames", percent(split.supervised), True, ""
    for name, head in split.heads.items():
        yield f"{name} positives", f"{head.positives:,}", False, HUES[name]
        yield "  of frames, before sampling", percent(head.before) if head.frames else "-", False, ""
        yield "  of supervised, after sampling", percent(head.after) if head.supervised else "-", True, ""
    yield "frames: speaking only", f"{split.speak_only:,}", False, ""
    yield "        DST only", f"{split.dst_only:,}", False, ""
    yield "        both", f"{split.both:,}", False, ""
    yield "        neither", f"{split.silence + split.not_sampled:,}", False, ""
    yield "clips that begin on an event", percent(split.first / split.clips), True, ""


def drops_by_reason(splits: list[Split], manifest: Mapping[str, Any]) -> dict[str, list[int]]:
    """Reason -> count per split, for reasons that occur."""
    told = manifest.get("splits") or {}
    drops = [(told.get(split.name) or {}).get("drops") or {} for split in splits]
    reasons = dict.fromkeys(reason for d in drops for reason, n in d.items() if n)
    return {reason: [d.get(reason, 0) for d in drops] for reason in reasons}


def _input_lines(manifest: Mapping[str, Any]) -> Iterator[Text]:
    """Per input file: what was found, and what was assumed."""
    for source in manifest.get("inputs") or []:
        yield Text(f"{plain(Path(str(source.get('path', '?'))).name)}: {plain(', '.join(_facts(source)))}", style="dim")
    skipped: dict[str, list[str]] = {}
    for one in manifest.get("skipped") or []:
        skipped.setdefault(one["why"], []).append("/".join(Path(one["path"]).parts[-2:]))
    for why, names in skipped.items():
        more = f" and {len(names) - 6:,} more" if len(names) > 6 else ""
        yield Text(f"left out, {plain(why)}: {plain(', '.join(names[:6]))}{more}", style="dim")


def _facts(source: Mapping[str, Any]) -> Iterator[str]:
    if "clips" in source:
        schemas = source.get("schemas") or {}
        of = f" of {' and '.join(schemas)}" if schemas else ""
        yield f"{source['clips']:,} {source.get('split', '')} clip{'' if source['clips'] == 1 else 's'}{of}"
    if source.get("frame_convention"):
        yield f"{source['frame_convention']} convention"
    if source.get("turns_not_fitting"):
        yield f"{source['turns_not_fitting']:,} of {source['votes']['turns']:,} turns do not fit it"
    if source.get("bounds_widened"):
        yield f"bounds of {source['bounds_widened']:,} clips widened to their turns (DST updates alone given)"
    if source.get("renamed"):
        yield f"{source['renamed']:,} ids extended by data set and video (another data set has the same)"
    if source.get("fps_assumed"):
        yield f"fps absent in {source['fps_assumed']:,} clips, 2 assumed"
    for name, count in (source.get("ignored_fields") or {}).items():
        yield f"{name} ignored in {count:,} clips (not text)"
    if source.get("quarantined"):
        yield f"{source['quarantined']:,} quarantined"


def _hazard_lines(hazards: Iterable[Mapping[str, str]]) -> Iterator[Text]:
    for hazard in hazards:
        yield Text.assemble(
            ("hazard", "bold red"),
            f" [{plain(hazard.get('split') or 'all')}] ",
            plain(hazard.get("text") or hazard.get("name") or ""),
        )

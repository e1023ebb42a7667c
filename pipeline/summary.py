"""The short table per split that `preprocess` ends with and `inspect` shows again: numbers in, table out.

The numbers are counted while shards are written, and kept in the manifest.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.text import Text

from pipeline.schema import HEAD_TITLES, HEADS
from pipeline.terminal import counted, percent, plain, table

HUES: Final = {"speaking": "dodger_blue1", "DST": "dark_orange"}  # by HEAD_TITLES
ONE_TABLE: Final = 5  # splits side by side


@dataclass(frozen=True, slots=True)
class Head:
    """One head's labels in one split; clips that say nothing about the head are left out."""

    positives: int
    frames: int  # before sampling: all frames of those clips
    supervised: int  # after sampling: frames with a 0 or a 1
    clips: int
    gaps: dict[float, int]  # seconds without a positive frame between two events of a clip -> how often

    @property
    def usual_gap(self) -> tuple[float, int, int]:
        """(the most frequent gap in seconds, how often, of how many); (0.0, 0, 0) without any."""
        seconds, count = max(self.gaps.items(), key=lambda item: (item[1], -item[0]), default=(0.0, 0))
        return seconds, count, sum(self.gaps.values())

    @property
    def median_gap(self) -> float | None:
        """In seconds; the lower one of two; None without gaps."""
        return statistics.median_low(Counter(self.gaps).elements()) if self.gaps else None


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
    heads: dict[str, Head]
    rates: list[float]  # distinct negative rates, ascending

    @property
    def supervised(self) -> float:
        return 1 - self.not_sampled / self.frames if self.frames else 0.0


def splits_of(manifest: Mapping[str, Any]) -> list[Split]:
    """The splits of an output folder, from its manifest: train, val, test first."""
    splits = []
    for name in sorted(manifest["splits"], key=split_order):
        counts, heads = manifest["splits"][name], {}
        for head in HEADS:
            numbers = {key: counts[f"{head}_{key}"] for key in ("frames", "supervised", "clips")}
            gaps = dict(counts.get(f"{head}_gaps", []))
            heads[head] = Head(positives=counts[f"{head}_positive"], gaps=gaps, **numbers)
        both = counts["both_positive"]
        speak_only, dst_only = (head.positives - both for head in heads.values())
        split = Split(
            name=name,
            **{key: counts[key] for key in ("clips", "recordings", "frames", "hours")},
            speak_only=speak_only,
            dst_only=dst_only,
            both=both,
            silence=counts["supervised"] - both - speak_only - dst_only,
            not_sampled=counts["frames"] - counts["supervised"],
            first=counts["first_frame_positive"],
            heads=heads,
            rates=counts.get("neg_rates", []),
        )
        splits.append(split)
    return splits


def split_order(name: str) -> tuple[int, str]:
    """Sort key of splits: train, val, test first, then others by name."""
    return {"train": 0, "val": 1, "test": 2}.get(name, 3), name


# ---- the table ---------------------------------------------------------------------------------------


def render_summary(manifest: Mapping[str, Any]) -> RenderableType:
    """A table (one column per split), then the inputs and hazards; 100 columns wide."""
    splits = splits_of(manifest)
    tables = []
    for some in (splits[i : i + ONE_TABLE] for i in range(0, len(splits), ONE_TABLE)):
        rows = table("", *(plain(split.name) for split in some))
        for row in zip(*map(_cells, some), strict=True):
            label, _, ends_section, style = row[0]
            rows.add_row(Text(label, style=style), *[value for _, value, *_ in row], end_section=ends_section)
        for reason, counts in drops_by_reason(some, manifest).items():
            rows.add_row(Text(f"dropped: {plain(reason)}"), *[f"{n:,}" if n else "-" for n in counts])
        tables.append(rows)
    lines = [Text(line, style="dim") for line in _input_lines(manifest)]
    for hazard in manifest["hazards"]:
        where = f" [{plain(hazard['split'])}] "
        lines.append(Text.assemble(("hazard", "bold red"), where, plain(hazard["text"])))
    return Group(*tables, *([Text(""), *lines] if lines else []))


def _cells(split: Split) -> Iterator[tuple[str, str, bool, str]]:
    """(label, value, whether a rule follows, style) down one split's column."""
    for name in ("clips", "recordings", "frames"):
        yield name, f"{getattr(split, name):,}", False, ""
    yield "hours", f"{split.hours:,.2f}", False, ""
    yield "supervised frames", percent(split.supervised), True, ""
    for name, head in split.heads.items():
        before, after = (percent(head.positives / n) if n else "-" for n in (head.frames, head.supervised))
        title = HEAD_TITLES[name]
        yield f"{title} positives", f"{head.positives:,}", False, HUES[title]
        yield "  of frames, before sampling", before, False, ""
        yield "  of supervised, after sampling", after, True, ""
    yield "frames: speaking only", f"{split.speak_only:,}", False, ""
    yield "        DST only", f"{split.dst_only:,}", False, ""
    yield "        both", f"{split.both:,}", False, ""
    yield "        neither", f"{split.silence + split.not_sampled:,}", False, ""
    yield "clips that begin on an event", percent(split.first / split.clips), True, ""


def drops_by_reason(splits: list[Split], manifest: Mapping[str, Any]) -> dict[str, list[int]]:
    """Reason -> count per split, for reasons that occur."""
    drops = [manifest["splits"][split.name].get("drops", {}) for split in splits]
    reasons = dict.fromkeys(reason for d in drops for reason, n in d.items() if n)
    return {reason: [d.get(reason, 0) for d in drops] for reason in reasons}


def _input_lines(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Per input file: what was found, and what was assumed; then what was left out."""
    for source in manifest.get("inputs") or []:
        schemas = f" of {' and '.join(source['schemas'])}" if source.get("schemas") else ""
        facts = [counted(source["clips"], f"{source['split']} clip") + schemas]
        facts.append(f"{source['frame_convention']} convention")
        remarks = {
            "turns_not_fitting": f"of {source.get('votes', {}).get('turns', 0):,} turns do not fit it",
            "bounds_widened": "clips with bounds widened to their turns (DST updates alone given)",
            "renamed": "ids extended by data set and video (another data set has the same)",
            "fps_assumed": "clips without fps, 2 assumed",
        }
        facts += [f"{source[key]:,} {what}" for key, what in remarks.items() if source.get(key)]
        ignored = (source.get("ignored_fields") or {}).items()
        facts += [f"{name} ignored in {count:,} clips (not text)" for name, count in ignored]
        facts += [f"{source['quarantined']:,} quarantined"] * bool(source.get("quarantined"))
        yield f"{plain(Path(source['path']).name)}: {plain(', '.join(facts))}"
    skipped: dict[str, list[str]] = {}
    for one in manifest.get("skipped") or []:
        skipped.setdefault(one["why"], []).append("/".join(Path(one["path"]).parts[-2:]))
    for why, names in skipped.items():
        more = f" and {len(names) - 6:,} more" if len(names) > 6 else ""
        yield f"left out, {plain(why)}: {plain(', '.join(names[:6]))}{more}"

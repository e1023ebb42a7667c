"""What a manifest tells people: the table that `preprocess` ends with and `inspect` shows again, and the dataset card.

The card (README.md) is what `datasets.load_dataset` and a hub need to know. Its last line holds the SHA-256 of the
rest: a card that somebody has edited, or any other README.md, does not match it and is left alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
from rich.console import Group, RenderableType
from rich.text import Text

from pipeline.schema import CLIPS, FRAMES, HEAD_TITLES, HEADS
from pipeline.terminal import counted, percent, plain, table

HUES: Final = {"speaking": "dodger_blue1", "DST": "dark_orange"}  # by HEAD_TITLES
CARD: Final = "README.md"
_LAST: Final = "<!-- Written by prospect-dst, and replaced by its next run unless edited. sha256: {} -->\n"


def render_summary(manifest: Mapping[str, Any]) -> RenderableType:
    """A table (one column per split), then the inputs and hazards; 100 columns wide."""
    splits = manifest["splits"]
    rows = table("", *splits)
    for cells in zip(*map(_cells, splits.values()), strict=True):
        label, _, ends_section, style = cells[0]
        rows.add_row(Text(label, style=style), *(value for _, value, *_ in cells), end_section=ends_section)
    for reason in dict.fromkeys(reason for counts in splits.values() for reason in counts["drops"]):
        dropped = (counts["drops"].get(reason) for counts in splits.values())
        rows.add_row(Text(f"dropped: {reason}"), *(f"{n:,}" if n else "-" for n in dropped))
    lines = [Text(line, style="dim") for line in _input_lines(manifest)]
    lines += [
        Text.assemble(("hazard", "bold red"), f" [{hazard['split']}] ", plain(hazard["text"]))
        for hazard in manifest["hazards"]
    ]
    return Group(rows, Text(""), *lines)


def _cells(counts: Mapping[str, Any]) -> Iterator[tuple[str, str, bool, str]]:
    """(label, value, whether a rule follows, style) down one split's column."""
    for name in ("clips", "recordings", "frames"):
        yield name, f"{counts[name]:,}", False, ""
    yield "hours", f"{counts['hours']:,.2f}", False, ""
    yield "supervised frames", percent(counts["supervised"] / counts["frames"]), True, ""
    for head, title in HEAD_TITLES.items():
        positives, totals = counts[f"{head}_positive"], (counts[f"{head}_frames"], counts[f"{head}_supervised"])
        before, after = (percent(positives / frames) if frames else "-" for frames in totals)
        yield f"{title} positives", f"{positives:,}", False, HUES[title]
        yield "  of frames, before sampling", before, False, ""
        yield "  of supervised, after sampling", after, True, ""
    speaking, dst_update = (counts[f"{head}_positive"] for head in HEADS)
    both = counts["both_positive"]
    yield "frames: speaking only", f"{speaking - both:,}", False, ""
    yield "        DST only", f"{dst_update - both:,}", False, ""
    yield "        both", f"{both:,}", False, ""
    yield "        neither", f"{counts['frames'] - speaking - dst_update + both:,}", False, ""
    yield "clips that begin on an event", percent(counts["first_frame_positive"] / counts["clips"]), True, ""


def _input_lines(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Per input file: what was found, and what was assumed; then what was left out."""
    for source in manifest["inputs"]:
        remarks = {
            "turns_not_fitting": f"of {source['votes']['turns']:,} turns do not fit it",
            "bounds_widened": "clips with bounds widened to their turns (DST updates alone given)",
            "renamed": "ids extended by data set and video (another data set has the same)",
            "fps_assumed": "clips without fps, 2 assumed",
            "quarantined": "quarantined",
        }
        schemas = f" of {' and '.join(source['schemas'])}" if source["schemas"] else ""
        facts = [counted(source["clips"], f"{source['split']} clip") + schemas]
        facts.append(f"{source['frame_convention']} convention")
        facts += [f"{source[key]:,} {remark}" for key, remark in remarks.items() if source[key]]
        facts += [f"{name} ignored in {n:,} clips (not text)" for name, n in source["ignored_fields"].items()]
        yield f"{plain(Path(source['path']).name)}: {plain(', '.join(facts))}"
    skipped: dict[str, list[str]] = {}
    for one in manifest["skipped"]:
        skipped.setdefault(one["why"], []).append("/".join(Path(one["path"]).parts[-2:]))
    for why, names in skipped.items():
        more = f" and {len(names) - 6:,} more" if len(names) > 6 else ""
        yield f"left out, {plain(why)}: {plain(', '.join(names[:6]))}{more}"


def card_text(manifest: Mapping[str, Any]) -> str:
    """The card. It may be published: files and the folder of the frames go by their names."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.PackageLoader("pipeline", "."), undefined=jinja2.StrictUndefined)
    environment.filters["plain"] = plain
    root = manifest["options"]["frames_root"]
    options = manifest["options"] | {"frames_root": root and Path(root).resolve().name}
    text = environment.get_template("card.md").render(
        manifest=manifest,
        options={name: json.dumps(value) for name, value in options.items()},
        tables={"frames": list(_columns(FRAMES)), "clips": list(_columns(CLIPS))},
    )
    return _signed(text)


def _columns(fields: Iterable[pa.Field], above: str = "") -> Iterator[tuple[str, str, str]]:
    """Name, type and meaning of each column; what is nested goes by its path."""
    for field in fields:
        inner = field.type.value_type if pa.types.is_list(field.type) else None
        meaning = field.metadata[b"doc"].decode() + (" (may be null)" if field.nullable else "")
        yield above + field.name, str(field.type) if inner is None else "list of struct", meaning
        yield from _columns(inner or (), f"{above}{field.name}.")


def is_our_card(path: Path) -> bool:
    """Whether the file is a card as it was written: not edited, not somebody's own."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return text == _signed(text[: -len(_signed(""))])


def _signed(text: str) -> str:
    return text + _LAST.format(hashlib.sha256(text.encode()).hexdigest())

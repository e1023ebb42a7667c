"""The dataset card, OUT/README.md: what `datasets.load_dataset` and a hub need to know, and what a person wants to.

It is a function of the manifest alone, so the same input gives the same bytes. Its last line holds the SHA-256 of the
rest: a card that somebody has edited, or any other README.md, does not match it and is left alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from pipeline.schema import CLIPS, FRAMES
from pipeline.summary import split_order
from pipeline.terminal import plain

CARD: Final = "README.md"
_LAST: Final = "<!-- Written by prospect-dst, and replaced by its next run unless edited. sha256: {} -->\n"
_COUNTS: Final = ("recordings", "clips", "frames", "supervised", "speaking_positive", "dst_update_positive")
_OF_INPUT: Final = ("split", "clips", "quarantined", "frame_convention")


def write(path: Path, manifest: dict[str, Any]) -> None:
    """Write the card of an output of `preprocess`, from what its manifest says."""
    path.write_bytes(_signed(_text(manifest)))


def is_ours(path: Path) -> bool:
    """Whether the file is a card as it was written: not edited, not somebody's own."""
    try:
        content = path.read_bytes()
        return content == _signed(content.decode().rpartition(_LAST.partition("{")[0])[0])
    except (OSError, UnicodeDecodeError):
        return False


def _signed(text: str) -> bytes:
    return (text + _LAST.format(hashlib.sha256(text.encode()).hexdigest())).encode()


def _text(manifest: dict[str, Any]) -> str:
    """The card without its last line. It may be published: files and the folder of the frames go by their names."""
    import jinja2

    root = manifest["options"]["frames_root"]

    def published(text: str) -> str:
        return text.replace(str(Path(root)), Path(root).name) if root and Path(root).is_absolute() else text

    splits = dict(sorted(manifest["splits"].items(), key=lambda one: split_order(one[0])))
    counts = [[name, *(f"{one[c]:,}" for c in _COUNTS), f"{one['hours']:.2f}"] for name, one in splits.items()]
    inputs = [
        [plain(Path(one["path"]).name), *(str(one.get(name, "")) for name in _OF_INPUT), one["sha256"][:16]]
        for one in manifest["inputs"]
    ]
    frames = "One row per frame; `clip` (or `clip_id`) and the split lead to its row in `clips`."
    clips = "One row per clip: its conversation, and what its labels follow from."
    columns = ("column", "type", "meaning")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    environment.filters["hub_name"] = lambda split: re.sub(r"\W", "_", split)  # as `datasets` allows it
    return environment.from_string(files("pipeline").joinpath("card.md").read_text(encoding="utf-8")).render(
        manifest=manifest,
        splits=splits,
        counts=_table(("split", *_COUNTS, "hours"), counts),
        hazards=[f"- {one['split']}: {plain(published(one['text']))}" for one in manifest["hazards"]],
        tables={
            "frames": (_table(columns, _columns(FRAMES)), frames),
            "clips": (_table(columns, _columns(CLIPS)), clips),
        },
        options={name: published(json.dumps(value)) for name, value in manifest["options"].items()},
        inputs=_table(("file", *_OF_INPUT, "sha256"), inputs),
    )


def _columns(fields: Iterable[pa.Field], above: str = "") -> Iterator[list[str]]:
    """Name, type and meaning of each column; what is nested goes by its path."""
    for field in fields:
        inner = field.type.value_type if pa.types.is_list(field.type) else None
        type_ = "list of struct" if inner is not None else str(field.type)
        meaning = field.metadata[b"doc"].decode() + (" (may be null)" if field.nullable else "")
        yield [f"`{above}{field.name}`", type_, meaning]
        if inner is not None:
            yield from _columns(inner, f"{above}{field.name}.")


def _table(header: Sequence[str], rows: Iterable[list[str]]) -> str:
    lines = [[name.replace("_", " ") for name in header], ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

"""The dataset card, OUT/README.md: what `datasets.load_dataset` and a hub need to know, and what a person wants to.

It is a function of the manifest alone, so the same input gives the same bytes. Its last line holds the SHA-256 of the
rest: a card that somebody has edited, or any other README.md, is told from ours by it and left alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from pipeline.schema import CLIPS, FRAMES
from pipeline.terminal import plain

CARD: Final = "README.md"
_TABLES: Final = {
    "frames": (FRAMES, "One row per frame; `clip` (or `clip_id`) and the split lead to its row in `clips`."),
    "clips": (CLIPS, "One row per clip: its conversation, and what its labels follow from."),
}
_LAST: Final = "<!-- Written by prospect-dst, and replaced by its next run unless edited. sha256: {} -->\n"

_TEXT: Final = """\
# Frame labels: when does the assistant speak, when does the state change?

Labels per video frame and the clips that they belong to, written by `prospect-dst preprocess`. The pictures are not
in here. The licence is that of the source, which is not known here.

```python
from datasets import load_dataset

frames, clips = load_dataset(FOLDER, "frames"), load_dataset(FOLDER, "clips")
```

Readers that know Hive partitions (polars, DuckDB, pyarrow) add a column `split` from the folders' names;
`load_dataset` gives the splits instead.

## Counts

{counts}

## Hazards

{hazards}
"""


def write(path: Path, manifest: dict[str, Any]) -> None:
    """Write the card of an output of `preprocess`, from what its manifest says."""
    path.write_bytes(_signed("\n".join(_parts(manifest)) + "\n"))


def is_ours(path: Path) -> bool:
    """Whether the file is a card as it was written: not edited, not somebody's own."""
    try:
        content = path.read_bytes()
        return content == _signed(content.decode().rpartition(_LAST.partition("{")[0])[0])
    except (OSError, UnicodeDecodeError):
        return False


def _signed(text: str) -> bytes:
    return (text + _LAST.format(hashlib.sha256(text.encode()).hexdigest())).encode()


def _parts(manifest: dict[str, Any]) -> Iterator[str]:
    order = ("train", "val", "test")
    splits = dict(sorted(manifest["splits"].items(), key=lambda one: (*(one[0] != name for name in order), one[0])))
    yield "---\nlicense: unknown\nconfigs:"
    for table in _TABLES:
        yield f"- config_name: {table}" + ("\n  default: true" if table == "frames" else "") + "\n  data_files:"
        yield from (f'  - split: "{_name(split)}"\n    path: {table}/split={split}/*.parquet' for split in splits)
    yield "---\n"
    counted = ("recordings", "clips", "frames", "supervised", "speaking_positive", "dst_update_positive")
    heads = ("split", *(name.replace("_", " ") for name in counted), "hours")
    rows = [[name, *(f"{one[c]:,}" for c in counted), f"{one['hours']:.2f}"] for name, one in splits.items()]
    root = manifest["options"]["frames_root"]
    found = [f"- {one['split']}: {plain(_published(one['text'], root))}" for one in manifest["hazards"]]
    yield _TEXT.format(counts=_rows(heads, rows), hazards="\n".join(found) or "None found.")
    for table, (schema, what) in _TABLES.items():
        yield f"## Columns of `{table}`\n\n{what}\n\n{_rows(('column', 'type', 'meaning'), _columns(schema))}\n"
    yield from _made(manifest)


def _made(manifest: dict[str, Any]) -> Iterator[str]:
    """How the output was made: version, options, input files by name (a card may be published, so no folders)."""
    version, schema = manifest["prospect_dst"], f"{manifest['schema_version']} ({manifest['schema_hash']})"
    yield f"## How it was made\n\nBy prospect-dst {version}, schema {schema}, with these options:\n"
    for name, value in manifest["options"].items():
        yield f"- {name}: `{_published(json.dumps(value), manifest['options']['frames_root'])}`"
    named = ("split", "clips", "quarantined", "frame_convention")
    rows = [
        [plain(Path(one["path"]).name), *(str(one.get(name, "")) for name in named), one["sha256"][:16]]
        for one in manifest["inputs"]
    ]
    yield "\n" + _rows(("file", *(name.replace("_", " ") for name in named), "sha256"), rows) + "\n"


def _published(text: str, root: str | None) -> str:
    """The text with the folder of the frames by its name alone, where it was given by its whole path."""
    return text.replace(str(Path(root)), Path(root).name) if root and Path(root).is_absolute() else text


def _columns(fields: Iterable[pa.Field], above: str = "") -> Iterator[list[str]]:
    """Name, type and meaning of each column; what is nested goes by its path."""
    for field in fields:
        inner = field.type.value_type if pa.types.is_list(field.type) else None
        type_ = "list of struct" if inner is not None else str(field.type)
        meaning = field.metadata[b"doc"].decode() + (" (may be null)" if field.nullable else "")
        yield [f"`{above}{field.name}`", type_, meaning]
        if inner is not None:
            yield from _columns(inner, f"{above}{field.name}.")


def _rows(heads: Iterable[str], rows: Iterable[list[str]]) -> str:
    lines = [list(heads)]
    lines += [["---"] * len(lines[0]), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _name(split: str) -> str:
    """As `datasets` allows it for a split."""
    return re.sub(r"\W", "_", split)

"""An output folder that is complete or absent: lock, staging, the swap of old and new, checks, Parquet options.

Everything is written below OUT/.staging-* and renamed into place at the end, the manifest last: a folder without
manifest.json holds nothing finished. A run killed at any point leaves the old complete output, or (in the
moment of the renames) none, and never blocks the next one.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset import read_manifest, verify_shard
from pipeline.errors import InputError
from pipeline.schema import CLIPS, FRAMES, MANIFEST, QUARANTINE
from pipeline.storage import LOCK, lock, make_folder, sha256, sync, write_json
from pipeline.summary import split_order
from pipeline.terminal import plain

STAGING: Final = ".staging-"
CARD: Final = "README.md"
_LAST: Final = "<!-- Written by prospect-dst, and replaced by its next run unless edited. sha256: {} -->\n"
_COUNTS: Final = ("recordings", "clips", "frames", "supervised", "speaking_positive", "dst_update_positive")
_OF_INPUT: Final = ("split", "clips", "quarantined", "frame_convention")
_SHARD = re.compile(r"(frames|clips)/split=[^/]+/part-\d{5,}\.parquet")


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Own the folder `out`; raises InputError when another run owns it, or it cannot be made.

    A folder that this run created and left without output is removed again.
    """
    created = not out.exists()
    try:
        make_folder(out)
    except OSError as error:
        raise InputError(f"{out}: cannot write there: {error.strerror}; choose another --out") from None
    with lock(out / LOCK, InputError(f"{out}: another run is writing there; wait for it, or choose another --out")):
        try:
            yield
        finally:
            if created and not (out / MANIFEST).exists():
                (out / LOCK).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    out.rmdir()


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """An empty folder inside `out`, which must be locked; gone afterwards. OSErrors become InputErrors."""
    try:
        for path in (path for table in ("frames", "clips") for path in (out / table).rglob("*")):
            if path.is_file() and not _SHARD.fullmatch(str(path.relative_to(out))):  # a user's videos, say
                raise InputError(f"{path}: found a file that is no shard, would be replaced; choose another --out")
        _clear(out)
        folder = Path(tempfile.mkdtemp(prefix=STAGING, dir=out))
        try:
            write_json(folder / "try" / MANIFEST, {})  # what `commit` will do, before the work is
            (folder / "try").rename(folder / "tried")
            shutil.rmtree(folder / "tried")
            yield folder
        finally:
            _clear(out)
    except OSError as error:
        if error.errno == errno.ENOSPC or "No space left" in str(error):
            what = f"{out}: no space left on the disk; nothing was changed; make room and run again"
        else:
            what = f"{error.filename or out}: {error.strerror or error}; nothing was changed"
        raise InputError(what) from None


def _clear(out: Path) -> None:
    """Remove staging folders, those of killed runs too: a worker may outlive its run and write there for a moment."""
    for left in out.glob(f"{STAGING}*"):
        shutil.rmtree(left, ignore_errors=True)


def commit(staged: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Swap the staged tables, the manifest and the dataset card into `out`; the manifest leaves first and comes last.

    What fails, or is interrupted, on the way is undone: the old output is back. A README.md that is not ours stays.
    """
    write_json(staged / MANIFEST, manifest)
    (staged / CARD).write_bytes(_signed(_card_text(manifest)))
    for path in staged.rglob("*"):
        sync(path)
    ours = ["frames", "clips", QUARANTINE]
    if is_our_card(out / CARD) or not os.path.lexists(out / CARD):
        ours.append(CARD)
    (staged / "old").mkdir()
    leaving = [(out / name, staged / "old" / name) for name in (MANIFEST, *ours)]
    coming = [(staged / name, out / name) for name in (*ours, MANIFEST)]
    moved: list[tuple[Path, Path]] = []
    try:
        for source, target in ((a, b) for a, b in leaving + coming if a.exists()):
            if target == out / MANIFEST:
                sync(out)
            source.rename(target)
            moved.append((source, target))
    except BaseException:
        for source, target in reversed(moved):
            target.rename(source)
        raise
    sync(out)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, once every file proves to be the one it lists; InputError names the damage otherwise."""
    manifest = read_manifest(folder)
    listed = {verify_shard(folder, shard) for shard in manifest["shards"]}
    quarantine, digest = folder / QUARANTINE, manifest.get("quarantine_sha256")
    if digest and not (quarantine.is_file() and sha256(quarantine) == digest):
        raise InputError(f"{quarantine}: missing, damaged or edited; run preprocess again")
    if others := set(folder.glob("*/split=*/*.parquet")) - listed:
        raise InputError(f"{min(others)}: a shard that {MANIFEST} does not list; remove it, or run preprocess again")
    return manifest


# ---- the dataset card: what `datasets.load_dataset` and a hub need to know, and what a person wants to ----
# A function of the manifest alone. Its last line holds the SHA-256 of the rest: a card that somebody has edited, or any
# other README.md, does not match it and is left alone.


def is_our_card(path: Path) -> bool:
    """Whether the file is a card as it was written: not edited, not somebody's own."""
    try:
        content = path.read_bytes()
        return content == _signed(content.decode().rpartition(_LAST.partition("{")[0])[0])
    except (OSError, UnicodeDecodeError):
        return False


def _signed(text: str) -> bytes:
    return (text + _LAST.format(hashlib.sha256(text.encode()).hexdigest())).encode()


def _card_text(manifest: dict[str, Any]) -> str:
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


# ---- Parquet -----------------------------------------------------------------------------------------

# Ids of frames are written from a dictionary. Encodings are chosen, not defaulted: 17 million frames take 8 MB
# instead of 116, in half the time.
FRAMES_WRITTEN: Final = FRAMES.set(0, pa.field("clip_id", pa.dictionary(pa.int32(), pa.string()), nullable=False))
_FRAMES_OPTIONS: dict[str, Any] = {
    "use_dictionary": ["clip_id", "clip", "speaking_label", "dst_update_label"],
    "column_encoding": {"frame": "DELTA_BINARY_PACKED", "time_s": "BYTE_STREAM_SPLIT"},
    "write_statistics": ["clip", "frame", "time_s"],  # those of ids and labels let no reader skip anything
}
# Text never repeats: looking for a dictionary, and keeping its longest value as statistics, only costs.
_REPEAT = ("dataset", "positive", "frame_convention", "goal", "knowledge", "role", "transition", "id", "name")


def _leaves(fields: Iterable[pa.Field], above: str = "") -> Iterator[str]:
    """Parquet paths of the leaf columns, e.g. turns.list.element.role."""
    for field in fields:
        if pa.types.is_list(field.type):
            yield from _leaves(field.type.value_type, f"{above}{field.name}.list.element.")
        else:
            yield above + field.name


_CLIPS_LEAVES = list(_leaves(CLIPS))
_CLIPS_OPTIONS: dict[str, Any] = {
    "use_dictionary": [leaf for leaf in _CLIPS_LEAVES if leaf.rpartition(".")[2] in _REPEAT],
    "write_statistics": [leaf for leaf in _CLIPS_LEAVES if leaf not in ("turns.list.element.text", "knowledge")],
}


@contextlib.contextmanager
def parquet_writer(path: Path, table: str) -> Iterator[pq.ParquetWriter]:
    """Write one shard of `frames` (batches of FRAMES_WRITTEN) or `clips` (of CLIPS), in a folder that exists.

    The Arrow schema that readers restore is put there by hand: it says plain string of ids that were a dictionary.
    """
    frames = table == "frames"
    written, options = (FRAMES_WRITTEN, _FRAMES_OPTIONS) if frames else (CLIPS, _CLIPS_OPTIONS)
    writer = pq.ParquetWriter(path, written, compression="zstd", compression_level=1, store_schema=False, **options)
    try:
        yield writer
        schema = base64.b64encode((FRAMES if frames else CLIPS).serialize().to_pybytes()).decode()
        writer.add_key_value_metadata({"ARROW:schema": schema})
        writer.close()
    finally:
        writer.is_open = False  # after a failure: the file stays as it is, unfinished

"""Files that are complete or absent: the folder lock, staging, atomic Parquet parts, the manifest.

Everything is written below OUT/.staging-* and renamed into place at the end, the manifest last: a folder without
manifest.json holds nothing finished. A run killed at any point leaves the old complete output, or (in the
moment of the renames) none. A killed run never blocks the next one.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import card
from pipeline.errors import InputError
from pipeline.schema import CLIPS, FRAMES, MANIFEST, QUARANTINE, SCHEMA_HASH, SCHEMA_VERSION, is_inside
from pipeline.storage import LOCK, lock, make_folder, sha256, sync, write_json
from pipeline.terminal import command, plain

STAGING: Final = ".staging-"
_SHARD = re.compile(r"(frames|clips)/split=[^/]+/part-\d{5,}\.parquet")
_OURS: Final = ("frames", "clips", QUARANTINE)  # what a run replaces; the manifest comes last


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
    taken = InputError(f"{out}: another run is writing there; wait for it, or choose another --out")
    with lock(out / LOCK, taken):
        try:
            yield
            created = False
        finally:
            if created and not (out / MANIFEST).exists():
                _remove_empty(out)


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """An empty folder inside `out`, which must be locked; gone afterwards. OSErrors become InputErrors."""
    try:
        _refuse_foreign(out)
        _clear(out)
        folder = Path(tempfile.mkdtemp(prefix=STAGING, dir=out))
        try:
            _try_out(folder)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise _explain(error, out) from None


def _try_out(folder: Path) -> None:
    """What `commit` will do, before the work is: rename a folder that holds something."""
    write_json(folder / "try" / MANIFEST, {})
    try:
        (folder / "try").rename(folder / "tried")
    except OSError as error:
        what = f"folders cannot be renamed there ({error.strerror}); choose an --out on another disk"
        raise OSError(error.errno, what, str(folder.parent)) from None
    shutil.rmtree(folder / "tried")


def _clear(out: Path) -> None:
    """Remove what runs left that were killed. Each has a name of its own: a worker that outlives its run for a
    moment writes nowhere else."""
    for left in out.glob(f"{STAGING}*"):
        shutil.rmtree(left, ignore_errors=True)


def _refuse_foreign(out: Path) -> None:
    """Never replace a folder `frames` or `clips` that holds anything but shards (frames of videos, say)."""
    for table in ("frames", "clips"):
        for path in (out / table).rglob("*"):
            if path.is_file() and not _SHARD.fullmatch(str(path.relative_to(out))):
                raise InputError(f"{path}: found a file that is no shard, would be replaced; choose another --out")


def _remove_empty(out: Path) -> None:
    (out / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        out.rmdir()


def _explain(error: OSError, out: Path) -> InputError:
    where = error.filename or out
    if error.errno == errno.ENOSPC or "No space left" in str(error):
        return InputError(f"{out}: no space left on the disk; nothing was changed; make room and run again")
    return InputError(f"{where}: {error.strerror or error}; nothing was changed")


def commit(staged: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Swap the staged tables, the manifest and the dataset card into `out`; the manifest leaves first and comes last.

    What fails, or is interrupted, on the way is undone: the old output is back. A README.md that is not ours stays.
    """
    write_json(staged / MANIFEST, manifest)
    readme = out / card.CARD
    ours = (*_OURS, card.CARD) if card.is_ours(readme) or not os.path.lexists(readme) else _OURS
    card.write(staged / card.CARD, manifest)
    for path in staged.rglob("*"):
        sync(path)
    old = staged / "old"
    old.mkdir()
    leaving = [(out / name, old / name) for name in (MANIFEST, *ours) if (out / name).exists()]
    coming = [(staged / name, out / name) for name in (*ours, MANIFEST) if (staged / name).exists()]
    moved: list[tuple[Path, Path]] = []
    try:
        for source, target in leaving + coming:
            if target == out / MANIFEST:
                sync(out)
            source.rename(target)
            moved.append((source, target))
    except BaseException:
        for source, target in reversed(moved):
            target.rename(source)
        raise
    sync(out)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest; None where there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) else None


def intact(folder: Path) -> bool:
    """Whether the folder holds a complete output, every shard unchanged."""
    try:
        return bool(verify(folder))
    except (InputError, OSError):
        return False


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, once every shard proves to be the one it lists; InputError names the damage otherwise."""
    manifest = _manifest(folder)
    redo = again(folder)
    listed = set()
    for shard in manifest["shards"]:
        _verify_shard(folder, shard, redo)
        listed.add(folder / shard["path"])
    if "quarantine_sha256" in manifest:
        _verify_quarantine(folder, manifest, redo)
    for path in sorted(folder.glob("*/split=*/*.parquet")):
        if path not in listed:
            raise InputError(f"{plain(path)}: a shard that {MANIFEST} does not list; remove it, or {redo}")
    return manifest


def again(folder: Path) -> str:
    """What to do about a folder that is not whole."""
    return f"run `{command('preprocess', '...', '--out', folder)}` again"


def _manifest(folder: Path) -> dict[str, Any]:
    path, redo = folder / MANIFEST, again(folder)
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        how = again(folder).removesuffix(" again")
        raise InputError(f"no {MANIFEST} in {plain(folder)}: not a finished output; {how}") from None
    except (ValueError, RecursionError, OSError) as e:
        raise InputError(f"{plain(path)}: not readable as JSON ({plain(e)}); {redo}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("shards"), list):
        raise InputError(f"{plain(path)}: not a manifest of prospect-dst (no list of shards); {redo}")
    found = (manifest.get("schema_version"), manifest.get("schema_hash"))
    if found != (SCHEMA_VERSION, SCHEMA_HASH):
        wrote, reads = f"schema {found[0]} ({found[1]})", f"{SCHEMA_VERSION} ({SCHEMA_HASH})"
        raise InputError(f"{plain(path)}: written for {plain(wrote)}, this version reads {reads}; {redo}")
    return manifest


def _verify_quarantine(folder: Path, manifest: dict[str, Any], redo: str) -> None:
    path = folder / QUARANTINE
    if not path.is_file() or sha256(path) != manifest["quarantine_sha256"]:
        raise InputError(f"{plain(path)}: missing, damaged or edited (sha256 is not the manifest's); {redo}")


def _verify_shard(folder: Path, shard: Any, redo: str) -> None:
    name = shard.get("path") if isinstance(shard, dict) else None
    if not isinstance(name, str) or not is_inside(name):
        raise InputError(f"{plain(folder / MANIFEST)}: lists a shard at {plain(name)}; {redo}")
    path = folder / name
    if not path.is_file():
        raise InputError(f"{plain(path)}: listed in {MANIFEST}, but missing; {redo}")
    if path.stat().st_size != shard.get("bytes"):
        found = f"{path.stat().st_size:,} bytes, expected {shard.get('bytes')}"
        raise InputError(f"{plain(path)}: damaged or edited, found {plain(found)}; {redo}")
    digest = sha256(path)
    if digest != shard.get("sha256"):
        text = f"damaged or edited, found sha256 {digest}, expected {plain(shard.get('sha256'))}"
        raise InputError(f"{plain(path)}: {text}; {redo}")


# ---- Parquet -----------------------------------------------------------------------------------------

# Chosen, not defaulted: 17 million frames take 8 MB instead of 116, in half the time.
_FRAMES_STORED = FRAMES.set(0, pa.field("clip_id", pa.dictionary(pa.int32(), pa.string()), nullable=False))
_FRAMES_OPTIONS: dict[str, Any] = {
    "use_dictionary": ["clip_id", "clip", "speaking_label", "dst_update_label"],
    "column_encoding": {"frame": "DELTA_BINARY_PACKED", "time_s": "BYTE_STREAM_SPLIT"},
    "write_statistics": ["clip", "frame", "time_s"],  # those of ids and labels let no reader skip anything
}
# Text never repeats: looking for a dictionary, and keeping its longest value as statistics, only costs.
_CLIPS_REPEAT = ("dataset", "positive", "frame_convention", "goal", "knowledge", "role", "transition", "id", "name")


def _leaves(type_: pa.DataType, path: str) -> Iterator[str]:
    """Parquet paths of the leaf columns below a column, e.g. turns.list.element.role."""
    if pa.types.is_list(type_):
        yield from _leaves(type_.value_type, f"{path}.list.element")
    elif pa.types.is_struct(type_):
        for child in type_:
            yield from _leaves(child.type, f"{path}.{child.name}")
    else:
        yield path


_CLIPS_LEAVES = [leaf for column in CLIPS for leaf in _leaves(column.type, column.name)]
_CLIPS_OPTIONS: dict[str, Any] = {
    "use_dictionary": [leaf for leaf in _CLIPS_LEAVES if leaf.rpartition(".")[2] in _CLIPS_REPEAT],
    "write_statistics": [leaf for leaf in _CLIPS_LEAVES if leaf not in ("turns.list.element.text", "knowledge")],
}


class TableWriter:
    """One Parquet part in a folder that exists; each `write` is one row group.

    The ids of `frames` come dictionary-encoded; the file still says plain string, because the Arrow schema
    that readers restore is put there by hand.
    """

    def __init__(self, path: Path, table: str) -> None:
        self.path = path
        self.schema = FRAMES if table == "frames" else CLIPS
        self.batch_schema = _FRAMES_STORED if table == "frames" else CLIPS  # what `write` takes
        options = _FRAMES_OPTIONS if table == "frames" else _CLIPS_OPTIONS
        self._writer = pq.ParquetWriter(
            path, self.batch_schema, compression="zstd", compression_level=1, store_schema=False, **options
        )
        self.rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        self._writer.write_table(pa.Table.from_batches([batch]), row_group_size=max(1, batch.num_rows))
        self.rows += batch.num_rows

    def abandon(self) -> None:
        """After a failure: leave the file as it is, and say nothing more about it."""
        self._writer.is_open = False

    def close(self) -> None:
        arrow = base64.b64encode(self.schema.serialize().to_pybytes()).decode()
        self._writer.add_key_value_metadata({"ARROW:schema": arrow})
        self._writer.close()

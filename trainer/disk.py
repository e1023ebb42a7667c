"""Files as they lie on disk: what they hold, and that they are there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have a file or a folder on disk, not only in memory, before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


SEAL = "sha256"  # where a JSON file has its own


def seal(content: dict[str, Any]) -> str:
    """SHA-256 of what a JSON file says: who compares it trusts no file that was damaged or edited since."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError name the file that is written: write() on a full disk knows none, nor does Arrow."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            what = error.strerror or " ".join(str(error).split())
            raise OSError(error.errno, what, str(path)) from None
        raise


def write_json(path: Path, content: Any) -> None:
    """Write `path` whole, or leave what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    with naming(path):
        new.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    sync(new)
    new.rename(path)

"""Atomic writes, folder locks and SHA-256, on the file systems that people have.

A write goes to a temporary file beside its place, is synced and renamed: whatever is killed, the old file or the new
one is complete. What a file system does not offer (fsync of a folder, flock) is skipped.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

LOCK: Final = ".lock"
_OURS = re.compile(rf"{re.escape(LOCK)}|\..+\.new|lost\+found")  # of a folder that is as good as empty


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """fsync of a file or a folder; skipped where the file system does not offer it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming(path: Path, new: Path | None = None) -> Iterator[None]:
    """Have an OSError name `path`, not its temporary file `new`; write() on a full disk names no file at all."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and str(error.filename) != str(new):
            raise
        raise OSError(error.errno, error.strerror or " ".join(str(error).split()), str(path)) from None


def make_folder(path: Path) -> None:
    """Make a folder and those above it."""
    if str(path) != str(path).encode(errors="replace").decode():
        raise OSError(errno.EILSEQ, "is not UTF-8, which Arrow cannot open; choose another name", str(path))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        problem = "is a file, or a link to what is not there; name a folder"
        raise NotADirectoryError(errno.ENOTDIR, problem, str(path)) from None


def is_vacant(folder: Path) -> bool:
    """Whether nothing is there, or a folder without a user's files: a lock, temporary files of a killed run at most."""
    return not folder.exists() or (folder.is_dir() and all(_OURS.fullmatch(name) for name in os.listdir(folder)))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write, which replaces `path` at the end; after an error it is removed.

    Its folder is made; a link is followed. OSErrors name `path`.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    make_folder(path.parent)
    name = os.fsencode(path.name)[:230].decode(errors="ignore")  # with what is added, at most 255 bytes
    new = path.with_name(f".{name}.{secrets.token_hex(4)}.new")
    try:
        with naming(path, new):
            yield new
            sync(new)
            move(new, path)
    finally:
        with contextlib.suppress(OSError):
            new.unlink()
    sync(path.parent)


def move(new: Path, path: Path) -> None:
    """Rename a file; where an open one may not be replaced (SMB, 9p), the old one is removed first."""
    try:
        new.replace(path)
    except PermissionError:
        path.unlink(missing_ok=True)
        new.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole; after an error the old one is there."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def lock(path: Path, taken: Exception) -> contextlib.AbstractContextManager[object]:
    """Hold the lock file `path` until the result is left or this process ends; none where the disk has no locks.

    Raises `taken` where another process holds it.
    """
    try:
        return FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False).acquire()
    except Timeout:
        raise taken from None
    except OSError:
        return contextlib.nullcontext()

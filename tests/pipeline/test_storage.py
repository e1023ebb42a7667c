"""File systems that refuse things, odd names and full disks: it works, or says what refuses and where."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from pipeline import storage

SPEC = importlib.util.spec_from_file_location("refusing", Path(__file__).parents[1] / "refusing" / "sitecustomize.py")
refuse = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(refuse)


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


# ---- writes --------------------------------------------------------------------------------------------


def test_a_file_is_replaced_where_niceties_are_refused_and_a_disk_without_renames_is_named(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        refuse.refuse(patch.setattr, tmp_path, "flock", "chmod", "fsync", "over")
        for text in ("one", "two"):
            storage.write_text(tmp_path / "file", text)
    assert files(tmp_path) == {"file": "two"}
    (tmp_path / "file").unlink()
    refuse.refuse(monkeypatch.setattr, tmp_path, "rename")
    with pytest.raises(OSError, match="renaming is refused there \\(Function not implemented\\)") as caught:
        storage.write_text(tmp_path / "file", "text")
    assert (caught.value.filename, files(tmp_path)) == (str(tmp_path / "file"), {})


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("when", ["written", "synced"])
def test_an_error_of_a_full_or_broken_disk_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch, number, when):
    def broken(handle):
        raise OSError(number, os.strerror(number))

    storage.write_text(tmp_path / "file", "old")
    target, name = (os, "fsync") if when == "synced" else (Path, "write_text")
    monkeypatch.setattr(target, name, lambda *given, **more: broken(given))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        storage.write_text(tmp_path / "file", "new")
    assert caught.value.filename == str(tmp_path / "file")
    assert files(tmp_path) == {"file": "old"}


def test_what_stands_in_the_way_of_a_folder_is_told(tmp_path):
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for name, what in (("gone", "is a link to what is not there"), ("file", "is a file, not a folder")):
        with pytest.raises(NotADirectoryError, match=what):
            storage.make_folder(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path)
    storage.make_folder(tmp_path / "link")


def test_space_is_checked_where_the_disk_knows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (100e9, 99e9, 1e9))
    with pytest.raises(OSError, match=r"1\.0 GB free, 2\.0 GB are needed") as caught:
        storage.check_space(tmp_path, 2 * 10**9)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (0, 0, 0))  # as some buckets say
    storage.check_space(tmp_path, 10**9)


# ---- locks ---------------------------------------------------------------------------------------------


def test_a_lock_keeps_others_out_until_it_is_left_also_past_a_forked_child(tmp_path):
    with storage.lock(tmp_path / ".lock", ValueError("taken")), (tmp_path / ".lock").open() as other:
        child = multiprocessing.get_context("fork").Process(target=int)
        child.start()
        child.join()
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(ValueError, match="taken"):
            storage.lock(tmp_path / ".lock", ValueError("taken"))
    storage.lock(tmp_path / ".lock", ValueError("taken")).__exit__(None, None, None)


def test_without_locks_a_run_goes_without_and_leaves_none_behind(tmp_path, monkeypatch):
    refuse.refuse(monkeypatch.setattr, tmp_path, "flock")
    for _ in range(2):  # the first is killed, as it were
        storage.lock(tmp_path / ".lock", ValueError("taken"))

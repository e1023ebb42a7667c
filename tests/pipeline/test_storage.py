"""File systems that refuse things, odd names and full disks: it works, or says what refuses and where."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import multiprocessing
import os
import shutil
import unicodedata
from pathlib import Path

import pytest

from pipeline import storage
from trainer.cli import main

SPEC = importlib.util.spec_from_file_location("refusing", Path(__file__).parents[1] / "refusing" / "sitecustomize.py")
refuse = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(refuse)
LONG = "n" * 255


def preprocess(out: Path, *more) -> int:
    source = out.parent / "train_a.json"
    turns = [{"role": "assistant", "content": "Well done.", "start_frame": 4, "end_frame": 6, "time": 2.0}]
    bounds = {"start_frame_idx": 0, "end_frame_idx": 24, "fps": 2}
    source.write_text(json.dumps([{"id": "a", "video_uid": "v0", "conversation": turns, "dst": [], **bounds}]))
    return main(["preprocess", str(source), "--out", str(out), "--workers", "1", *map(str, more)])


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


# ---- writes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [["flock"], ["chmod"], ["fsync"], ["over"], ["flock", "chmod", "fsync", "over"]])
def test_a_file_is_replaced_where_niceties_are_refused(tmp_path, monkeypatch, what):
    refuse.refuse(monkeypatch.setattr, tmp_path, *what)
    for text in ("one", "two"):
        storage.write_text(tmp_path / "file", text)
    assert files(tmp_path) == {"file": "two"}


def test_a_disk_without_renames_is_named(tmp_path, monkeypatch):
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


@pytest.mark.parametrize(
    "name", [LONG, "é" * 127, unicodedata.normalize("NFD", "é"), "two  words'", os.fsdecode(b"\xff")]
)
def test_any_name_that_a_disk_takes_can_be_written(tmp_path, name):
    for text in ("one", "two"):
        storage.write_text(tmp_path / name, text)
    assert files(tmp_path) == {name: "two"}


def test_a_name_that_is_too_long_is_named(tmp_path):
    with pytest.raises(OSError, match="too long") as caught:
        storage.write_text(tmp_path / (LONG + "n"), "text")
    assert caught.value.filename == str(tmp_path / (LONG + "n"))


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


# ---- commands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [["flock", "chmod"], ["fsync", "over"]])
def test_preprocess_works_where_niceties_are_refused(tmp_path, monkeypatch, what):
    refuse.refuse(monkeypatch.setattr, tmp_path, *what)
    assert [preprocess(tmp_path / "out"), preprocess(tmp_path / "out", "--pad-s", 1)] == [0, 0]
    assert main(["inspect", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(("what", "why"), [("folders", "Too many open files"), ("rename", "Function not implemented")])
def test_preprocess_says_at_once_that_renaming_is_refused(tmp_path, monkeypatch, capsys, what, why):
    refuse.refuse(monkeypatch.setattr, tmp_path, what)
    monkeypatch.setattr("pipeline.preprocess.extract", None)  # nothing is read
    assert preprocess(tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "out") in error
    assert why in error
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.preprocess.extract", None)  # nothing is read
    (tmp_path / "link").symlink_to("nowhere")
    for name, why in (
        (os.fsdecode(b"caf\xe9"), "is not UTF-8, which Arrow cannot open"),
        ("link", "is a link to what"),
    ):
        assert preprocess(tmp_path / name) == 1
        assert why in capsys.readouterr().err


def test_a_finished_output_is_skipped_where_nothing_may_be_written(tmp_path, monkeypatch, capsys):
    assert preprocess(tmp_path / "out") == 0
    monkeypatch.setattr(storage, "FileLock", lambda *args, **more: (_ for _ in ()).throw(OSError(errno.EROFS, "ro")))
    assert preprocess(tmp_path / "out") == 0
    assert "nothing changed since the last run" in capsys.readouterr().out

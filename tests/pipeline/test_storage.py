"""File systems that refuse things: it works, or says what refuses and where."""

import fcntl

import pytest
from refusing.sitecustomize import refuse

from pipeline import storage


def test_a_file_is_replaced_where_niceties_are_refused_and_a_disk_without_renames_is_named(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        refuse(patch.setattr, tmp_path, "flock", "chmod", "fsync", "over")
        for text in ("one", "two"):
            storage.write_text(tmp_path / "file", text)
            storage.lock(tmp_path / ".lock", ValueError("taken"))  # the first run is killed, as it were
    assert (tmp_path / "file").read_text() == "two"
    (tmp_path / "file").unlink()
    refuse(monkeypatch.setattr, tmp_path, "rename")
    with pytest.raises(OSError, match="Function not implemented") as caught:
        storage.write_text(tmp_path / "file", "text")
    assert (caught.value.filename, (tmp_path / "file").exists()) == (str(tmp_path / "file"), False)


def test_a_lock_keeps_others_out_until_it_is_left(tmp_path):
    with storage.lock(tmp_path / ".lock", ValueError("taken")), (tmp_path / ".lock").open() as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(ValueError, match="taken"):
            storage.lock(tmp_path / ".lock", ValueError("taken"))
    storage.lock(tmp_path / ".lock", ValueError("taken")).__exit__(None, None, None)

"""A file system that refuses calls, for tests: below $FAKE_FS those in $REFUSED (on PYTHONPATH), or by `refuse`."""

import errno
import fcntl
import os

RENAMES = ("rename", "replace")
REFUSALS = {  # name: (module, functions, error, given which arguments)
    "flock": (fcntl, ("flock",), errno.ENOSYS, lambda *given: True),  # as Lustre without -o flock
    "chmod": (os, ("chmod", "fchmod"), errno.EPERM, lambda *given: True),  # as CIFS, exFAT and mounted buckets
    "fsync": (os, ("fsync",), errno.EINVAL, lambda fd: os.path.isdir(_path(fd))),  # of a folder, as CIFS and FUSE
    "over": (os, RENAMES, errno.EACCES, lambda old, new: os.path.isfile(new)),  # as SMB while somebody has it open
    "folders": (os, RENAMES, errno.EMFILE, lambda old, new: os.path.isdir(old)),  # as gcsfuse
    "rename": (os, RENAMES, errno.ENOSYS, lambda *given: True),  # as mountpoint-s3
}


def _path(file) -> str:
    if isinstance(file, int) or hasattr(file, "fileno"):
        file = os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")
    return os.path.abspath(os.fsdecode(file))


def _refusing(real, root, number, when, names_files):
    def call(first, *more, **named):
        if _path(first).startswith(str(root)) and when(first, *more):
            raise OSError(number, os.strerror(number), *([first, None, *more] if names_files else []))
        return real(first, *more, **named)

    return call


def refuse(patch, root, *what):
    """patch: setattr, or monkeypatch.setattr."""
    for module, names, number, when in (REFUSALS[name] for name in what):
        for name in names:
            patch(module, name, _refusing(getattr(module, name), root, number, when, names is RENAMES))


if "FAKE_FS" in os.environ:
    refuse(setattr, os.environ["FAKE_FS"], *os.environ["REFUSED"].split(","))

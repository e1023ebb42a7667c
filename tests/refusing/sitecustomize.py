"""A file system that refuses calls, for tests: below $FAKE_FS those in $REFUSED (on PYTHONPATH), or by `refuse`.

flock        ENOSYS, as Lustre without -o flock
chmod        EPERM, as CIFS, exFAT and mounted buckets
fsync        EINVAL of a folder, as CIFS and FUSE
over         EACCES of a rename over a file that is there, as SMB while somebody has it open
folders      EMFILE of a rename of a folder, as gcsfuse
rename       ENOSYS of any rename, as mountpoint-s3
"""

import errno
import fcntl
import os


def refuse(patch, root, *what):
    """patch: setattr, or monkeypatch.setattr."""

    def inside(path):
        if isinstance(path, int) or hasattr(path, "fileno"):
            path = os.readlink(f"/proc/self/fd/{path if isinstance(path, int) else path.fileno()}")
        return os.path.abspath(os.fsdecode(path)).startswith(str(root))

    def refusing(module, name, number, when=lambda *given: True):
        real = getattr(module, name)

        def call(first, *more, **named):
            if inside(first) and when(first, *more):
                raise OSError(
                    number, os.strerror(number), *([first, None, *more] if name in ("rename", "replace") else [])
                )
            return real(first, *more, **named)

        patch(module, name, call)

    if "flock" in what:
        refusing(fcntl, "flock", errno.ENOSYS)
    if "chmod" in what:
        refusing(os, "chmod", errno.EPERM)
        refusing(os, "fchmod", errno.EPERM)
    if "fsync" in what:
        refusing(os, "fsync", errno.EINVAL, lambda fd: os.path.isdir(os.readlink(f"/proc/self/fd/{fd}")))
    for name in ("rename", "replace"):
        if "over" in what:
            refusing(os, name, errno.EACCES, lambda old, new: os.path.isfile(new))
        if "folders" in what:
            refusing(os, name, errno.EMFILE, lambda old, new: os.path.isdir(old))
        if "rename" in what:
            refusing(os, name, errno.ENOSYS)


if "FAKE_FS" in os.environ:
    refuse(setattr, os.environ["FAKE_FS"], *os.environ["REFUSED"].split(","))

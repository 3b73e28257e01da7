"""Errors of a file system, reported in full: which file, why, the space needed, the space free, and where."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_stepkto.base.errors import MachineFault, UserError

# Faults of the machine, which may pass: a batch system retries. A wrong path is the user's error, and does not.
STORAGE_FAULTS = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT,
        errno.EREMOTEIO, errno.ENOTCONN,
    }
)  # fmt: skip
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
NEARLY_FULL_BYTES = 1 << 20


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name ``path`` where the file system refuses to write it.

    Raises:
        MachineFault: in place of an OSError with a code in ``STORAGE_FAULTS``.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in STORAGE_FAULTS:
            raise
        raise MachineFault(refusal(path, error)) from error


def refusal(path: Path, error: OSError, num_bytes: int | None = None) -> str:
    """The message for ``path``, which could not be written. num_bytes: its size, where known in advance."""
    needs = f"it needs {size(num_bytes)}; " if num_bytes is not None else ""
    fix = "free some space and run the same command again"
    if error.errno == errno.EDQUOT:
        fix = "free some space, or raise your quota, and run the same command again"
    elif error.errno not in FULL:
        fix = "once the file system works again, run the same command"
    return f"{path}: could not be written: {error.strerror}; {needs}{_free(path)}; {fix}"


def check_space(path: Path, num_bytes: int, what: str) -> None:
    """Raises MachineFault where less than ``num_bytes`` are free for ``what``, which will be written to ``path``."""
    if shutil.disk_usage(_existing(path)).free < num_bytes:
        raise MachineFault(
            f"{path}: {what} needs {size(num_bytes)}; {_free(path)}; free some space, or choose a folder on another "
            "file system, and run the same command again"
        )


def check_working_directory() -> None:
    """Raises UserError where it was deleted: no relative path can be resolved then."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the working directory was deleted; change into a folder that exists") from None


def is_nearly_full(path: Path) -> bool:
    return shutil.disk_usage(_existing(path)).free < NEARLY_FULL_BYTES


def size(num_bytes: float) -> str:
    """'3 bytes', '1.50 MB', '141 GB': three digits, powers of 1000."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            digits = max(0, 2 - len(str(int(num_bytes / scale))) + 1)
            return f"{num_bytes / scale:.{digits}f} {unit}"
    return f"{num_bytes:.0f} bytes"


def _free(path: Path) -> str:
    place = _existing(path)
    usage = shutil.disk_usage(place)
    mount = next(each for each in (place.resolve(), *place.resolve().parents) if each.is_mount())
    return f"{size(usage.free)} of {size(usage.total)} are free on {mount}"


def _existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    path = Path(os.path.abspath(path))
    return next((each for each in (path, *path.parents) if each.exists()), Path("/"))

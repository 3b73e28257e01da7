"""A folder that appears whole, by rename, or not at all; one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_stepkto.errors import UserError


@contextlib.contextmanager
def whole_folder(target: Path, num_bytes: int) -> Iterator[Path]:
    """Yield an empty folder beside ``target``; on a clean exit it becomes ``target``, replacing what was there.

    An error or Ctrl-C removes it; after a hard kill ``.NAME.partial`` is left, which the next attempt empties.
    The files' contents must be on disk (flushed) when the block ends; their names are flushed here.

    Args:
        num_bytes: that will be written; less free space is refused at once.

    Raises:
        UserError: another process writes to ``target``, or the disk lacks space.
    """
    partial, old = (target.with_name(f".{target.name}.{what}") for what in ("partial", "old"))
    partial.parent.mkdir(parents=True, exist_ok=True)
    handle = _lock(partial, target)
    try:
        _empty(partial)
        _check_space(partial, num_bytes)
        yield partial
        for folder in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
            _flush(folder)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        partial.rename(target)
        _flush(target.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{target.parent}: the disk is full; nothing was kept. Free {num_bytes / 1e9:.2f} GB and "
                "run the command again"
            ) from None
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(handle)
    shutil.rmtree(old, ignore_errors=True)


def _lock(partial: Path, target: Path) -> int:
    """Make the folder and hold it, until the handle is closed or the process dies."""
    while True:
        partial.mkdir(exist_ok=True)
        handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(
                f"{target}: another process is writing it: wait for it or stop it, then run the command again"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), partial.stat()):
                return handle
        os.close(handle)  # the other process has just finished: what we hold is no longer called so


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"{folder.parent}: {num_bytes / 1e9:.2f} GB will be written, {free / 1e9:.2f} GB are free; "
            "free some space or choose another disk"
        )


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""A folder that appears whole, by rename, or not at all; one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import flush
from megatron_stepkto.base.locks import Lock, exclusive_lock
from megatron_stepkto.base.progress import say


@contextlib.contextmanager
def whole_folder(target: Path, num_bytes: int, *, replace: bool = True) -> Iterator[Path]:
    """Yield an empty folder beside ``target``; on a clean exit it becomes ``target``, replacing what was there.

    An error or Ctrl-C removes it, unless another process took this one for dead and began it anew; after a hard kill
    ``.NAME.partial`` is left, which the next attempt takes over.
    The folder ``.NAME.lock`` always stays, with one small file: were it removed, its numbers would begin again, and a
    process that was taken for dead could not tell a fresh owner's lock from its own.
    The files' contents must be on disk (flushed) when the block ends; their names are flushed here.

    Args:
        num_bytes: that will be written; less free space is refused at once.
        replace: False: refuse a ``target`` that is there, also one that came while the caller looked at its input.

    Raises:
        UserError: another process writes to ``target`` or has just done so, or the disk lacks space.
    """
    partial, old, lock = (target.with_name(f".{target.name}.{what}") for what in ("partial", "old", "lock"))
    with exclusive_lock(lock, str(target), note=say) as held:
        if target.exists() and not replace:
            raise UserError(f"{target}: already there: another process has just written it; run the command again")
        try:
            partial.mkdir(exist_ok=True)
            _empty(partial)
            _check_space(partial, num_bytes)
            yield partial
            for folder in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
                flush(folder)
            held.check()
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
                target.rename(old)
            partial.rename(target)
            flush(target.parent)
        except OSError as error:
            _remove_if_ours(partial, held)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"{target.parent}: the disk is full; nothing was kept. Free {num_bytes / 1e9:.2f} GB and "
                    "run the command again"
                ) from None
            raise
        except BaseException:
            _remove_if_ours(partial, held)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _remove_if_ours(partial: Path, held: Lock) -> None:
    """Who took the lock over from this process, which seemed dead, is filling the folder under the same name."""
    if held.is_ours:
        shutil.rmtree(partial, ignore_errors=True)


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

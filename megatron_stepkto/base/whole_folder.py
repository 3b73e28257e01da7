"""A folder that appears whole, by rename, or not at all; one writer at a time."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_stepkto.base.errors import MachineFault, UserError
from megatron_stepkto.base.files import flush
from megatron_stepkto.base.locks import Lock, exclusive_lock
from megatron_stepkto.base.progress import say
from megatron_stepkto.base.storage import STORAGE_FAULTS, check_space, refusal


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
        UserError: another process writes to ``target`` or has just done so.
        MachineFault: the disk lacks space, or fails.
    """
    partial, old, lock = (target.with_name(f".{target.name}.{what}") for what in ("partial", "old", "lock"))
    with exclusive_lock(lock, str(target), note=say) as held:
        if target.exists() and not replace:
            raise UserError(f"{target}: already there: another process has just written it; run the command again")
        try:
            partial.mkdir(exist_ok=True)
            _empty(partial)
            check_space(target, num_bytes, "the converted model")
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
            message = refusal(target, error, num_bytes)  # before room is made again
            _remove_if_ours(partial, held)
            if error.errno not in STORAGE_FAULTS:
                raise
            raise MachineFault(f"{message}; nothing was kept") from None
        except BaseException:
            _remove_if_ours(partial, held)
            raise
        shutil.rmtree(old, ignore_errors=True)


def remove_replaced(target: Path) -> None:
    """Remove what a kill left of the folder that ``target`` replaced: it may be as large as a model."""
    old = target.with_name(f".{target.name}.old")
    if target.exists() and old.exists():
        with exclusive_lock(target.with_name(f".{target.name}.lock"), str(target), note=say):
            shutil.rmtree(old)


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

"""A folder that appears complete, by rename, or not at all; one writer at a time."""

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

    An error or Ctrl-C removes it, unless another process considered this one dead and started over; after a hard kill
    ``.NAME.partial`` remains, which the next attempt removes.
    The folder ``.NAME.lock`` always stays, with one small file: if it were removed, its numbers would start again,
    and a process that was considered dead could not tell a new owner's lock from its own.
    The files' contents must be on disk (flushed) when the block ends; their names are flushed here.

    Args:
        num_bytes: to be written; with less free space nothing is begun.
        replace: False: refuse an existing ``target``, even one that appeared while the caller checked its input.

    Raises:
        UserError: another process writes to ``target`` or has just done so.
        MachineFault: the disk lacks space, or fails.
    """
    partial, old, lock = (target.with_name(f".{target.name}.{what}") for what in ("partial", "old", "lock"))
    with exclusive_lock(lock, str(target), note=say) as held:
        if target.exists() and not replace:
            raise UserError(f"{target}: already exists: another process has just written it; run the command again")
        try:
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir()
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
            message = refusal(target, error, num_bytes)  # before space is freed
            _remove_if_ours(partial, held)
            if error.errno not in STORAGE_FAULTS:
                raise
            raise MachineFault(f"{message}; nothing was kept") from None
        except BaseException:
            _remove_if_ours(partial, held)
            raise
        shutil.rmtree(old, ignore_errors=True)


def remove_replaced(target: Path) -> None:
    """Remove the folder that ``target`` replaced, if a kill left it behind: it may be as large as a model."""
    old = target.with_name(f".{target.name}.old")
    if target.exists() and old.exists():
        with exclusive_lock(target.with_name(f".{target.name}.lock"), str(target), note=say):
            shutil.rmtree(old)


def _remove_if_ours(partial: Path, held: Lock) -> None:
    """Remove it, unless another process took the lock over and now fills a folder of the same name."""
    if held.is_ours:
        shutil.rmtree(partial, ignore_errors=True)

"""From a folder of either kind to the other: which direction, what is at the target already, what may be replaced."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.whole_folder import remove_replaced
from megatron_stepkto.checkpoints.convert import (
    COMPANIONS,
    HF_TO_MEGATRON,
    MEGATRON_TO_HF,
    Converted,
    hf_to_megatron,
    megatron_to_hf,
)
from megatron_stepkto.checkpoints.huggingface import ADAPTER, CHAT_TEMPLATES, WEIGHT_SUFFIXES, is_companion
from megatron_stepkto.checkpoints.manifest import NAME as MANIFEST
from megatron_stepkto.checkpoints.stored_names import TRACKER
from megatron_stepkto.checkpoints.verify import is_finished

_FOLDERS_OF_A_MODEL = re.compile(rf"{COMPANIONS}|{CHAT_TEMPLATES}|iter_\d+|release")  # the last two: Megatron-LM's


def direction_of(source: Path) -> str:
    """``HF_TO_MEGATRON`` or ``MEGATRON_TO_HF``.

    Raises:
        UserError: the folder is neither a Hugging Face model nor a Megatron checkpoint.
    """
    if (source / ".metadata").is_file() or (source / TRACKER).is_file():
        return MEGATRON_TO_HF
    if (source / "config.json").is_file() or (source / ADAPTER).is_file():
        return HF_TO_MEGATRON
    raise UserError(
        f"{source}: expected a Hugging Face folder (with config.json), a Megatron torch_dist checkpoint (with "
        f".metadata) or a trainer's folder of them (with {TRACKER}), found none of these"
    )


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    direction: str | None = None,
    replace: bool = False,
    workers: int | None = None,
) -> Converted | None:
    """Convert a Hugging Face folder to a Megatron ``torch_dist`` folder, or back, bit for bit.

    ``target`` appears whole or not at all. About 0.2 GB of memory for a model of any size; Megatron-Core is not needed.

    Args:
        direction: ``HF_TO_MEGATRON`` or ``MEGATRON_TO_HF``; None: that of ``source``.
        replace: replace a model that is at ``target``. A folder that holds anything else is never replaced.
        workers: threads; None: one per core, at most 8.

    Returns:
        The number of tensors and their bytes; None where ``target`` already is the finished result of ``source``.

    Raises:
        UserError: ``source`` is not a model or is damaged (all faults are named), or ``target`` is taken.
        MachineFault: the disk is full or fails.
    """
    source, target = Path(source), Path(target)
    direction = direction or direction_of(source)
    if target.name in ("", ".."):
        target = Path(os.path.abspath(target))
    _check_places(source, target)
    if target.exists() and not replace:
        if target.is_dir() and is_finished(source, target, direction, workers):
            remove_replaced(target)
            return None
        raise UserError(
            f"{target}: already there, and not the result of {source}; choose another folder, or replace it (--force)"
        )
    _check_replaceable(target)
    run = hf_to_megatron if direction == HF_TO_MEGATRON else megatron_to_hf
    return run(source, target, workers=workers, replace=replace)


def _check_places(source: Path, target: Path) -> None:
    """Raises UserError where writing ``target`` would touch ``source``, or where no folder can be made."""
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents:
        raise UserError(f"{target}: is inside {source}; choose a folder beside it")
    if there in here.parents:
        raise UserError(f"{target}: holds {source}, which would be removed; choose another folder")
    if file := next((parent for parent in target.parents if parent.exists() and not parent.is_dir()), None):
        raise UserError(f"{target}: {file} is a file; choose another folder")


def _check_replaceable(target: Path) -> None:
    """Raises UserError where a replacement would remove something other than a model."""
    if target.is_symlink():
        raise UserError(f"{target}: is a link to {target.resolve()}; give that folder itself")
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target}: is a file; choose another name")
    found = sorted(path.name for path in target.iterdir())
    holds_weights = any(name.endswith(".safetensors") for name in found)
    if found and not set(found) & {MANIFEST, TRACKER, ".metadata"} and not ("config.json" in found and holds_weights):
        raise UserError(
            f"{target}: --force replaces a model, and this folder holds none, but {_some(found)}; choose another "
            "folder, or remove it yourself"
        )
    if others := [path.relative_to(target).as_posix() for path in _other_things(target)]:
        raise UserError(
            f"{target}: --force replaces a model, and this folder holds other things too: {_some(others)}; move them "
            "away, choose another folder, or remove it yourself"
        )


def _other_things(folder: Path) -> Iterator[Path]:
    """Files that are not weights, do not travel with a model and are not a conversion's; links are not followed."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if _FOLDERS_OF_A_MODEL.fullmatch(path.name):
                yield from _other_things(path)
            else:
                yield path
        elif not (
            path.name == ".metadata" or path.name.endswith((".distcp", *WEIGHT_SUFFIXES)) or is_companion(path.name)
        ):
            yield path


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")

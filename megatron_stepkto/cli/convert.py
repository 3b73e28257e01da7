"""The command line of conversion: ``stepkto convert IN OUT`` and the two tools are the same code."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.progress import console, say
from megatron_stepkto.base.whole_folder import remove_replaced
from megatron_stepkto.checkpoints.convert import (
    COMPANIONS,
    HF_TO_MEGATRON,
    MEGATRON_TO_HF,
    hf_to_megatron,
    megatron_to_hf,
)
from megatron_stepkto.checkpoints.huggingface import ADAPTER, CHAT_TEMPLATES, WEIGHT_SUFFIXES, is_companion
from megatron_stepkto.checkpoints.manifest import NAME as MANIFEST
from megatron_stepkto.checkpoints.stored_names import TRACKER
from megatron_stepkto.checkpoints.verify import is_finished, verify
from megatron_stepkto.cli.conversion_options import EPILOG, LAYOUT, add_conversion_options
from megatron_stepkto.planning.mapping import dry_run
from megatron_stepkto.recipe.keys import Parallel


def tool(direction: str, description: str | None) -> None:
    """``tools/hf_to_megatron.py`` and ``tools/megatron_to_hf.py``."""
    from megatron_stepkto.cli.guard import guarded

    parser = argparse.ArgumentParser(
        description=description, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("output", type=Path, metavar="OUT", nargs="?", help="not needed with --dry-run")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    add_conversion_options(parser)
    guarded(lambda: run_conversion(parser.parse_args(), direction))


def direction_of(source: Path) -> str:
    """Raises UserError for a folder that is neither a Hugging Face model nor a Megatron checkpoint."""
    if (source / ".metadata").is_file():
        return MEGATRON_TO_HF
    if (source / "config.json").is_file() or (source / ADAPTER).is_file():
        return HF_TO_MEGATRON
    raise UserError(
        f"{source}: expected a Hugging Face folder (with config.json) or a Megatron torch_dist checkpoint (with "
        ".metadata), found neither"
    )


def run_conversion(arguments: argparse.Namespace, direction: str | None = None) -> None:
    """Raises UserError; exits with 1 when --verify finds differences."""
    source, target = arguments.source, arguments.output
    workers = arguments.workers
    if arguments.dry_run:
        sys.stdout.write(dry_run(source, _layout(arguments)))
        return
    if given := [f"--{name.replace('_', '-')}" for name in LAYOUT if getattr(arguments, name)]:
        raise UserError(
            f"{', '.join(given)}: expected with --dry-run only; a Megatron folder holds whole tensors and loads at any "
            "layout, so leave it out"
        )
    if target is None:
        raise UserError("OUT is missing: say where the converted checkpoint shall be written")
    direction = direction or direction_of(source)
    if not (target.exists() and arguments.verify and not arguments.force):
        _convert(source, target, direction, arguments.force, workers)
    if arguments.verify:
        _verify(source, target, direction, workers)


def _layout(arguments: argparse.Namespace) -> Parallel:
    tensor, pipeline, expert = arguments.tensor or 1, arguments.pipeline or 1, arguments.expert or 1
    if arguments.virtual_pipeline and min(arguments.virtual_pipeline, pipeline) == 1:
        raise UserError("--virtual-pipeline: expected 2 or more, with --pipeline 2 or more")
    return Parallel(
        ranks=tensor * pipeline * expert,
        tensor=tensor,
        pipeline=pipeline,
        expert=expert,
        virtual_pipeline=arguments.virtual_pipeline,
        sequence=tensor > 1,
    )


def _convert(source: Path, target: Path, direction: str, force: bool, workers: int | None) -> None:
    if target.name in ("", ".."):
        target = Path(os.path.abspath(target))
    _check_places(source, target)
    if target.exists() and not force:
        if target.is_dir() and is_finished(source, target, direction, workers):
            remove_replaced(target)
            say(f"{target}: already the finished result of {source}; nothing to do")
            return
        raise UserError(f"{target}: already there, and not the result of {source}; choose another folder, or --force")
    _check_replaceable(target)
    began = time.monotonic()
    if direction == HF_TO_MEGATRON:
        done = hf_to_megatron(source, target, workers=workers, replace=force)
    else:
        done = megatron_to_hf(source, target, workers=workers, replace=force)
    seconds = time.monotonic() - began
    say(
        f"{target}: {done.num_tensors} tensors, all finite, {done.weight_bytes / 1e9:.3g} GB "
        f"in {seconds:.1f} s ({done.weight_bytes / 1e9 / seconds:.2g} GB/s)"
    )


def _check_places(source: Path, target: Path) -> None:
    """Raises UserError where writing ``target`` would touch ``source``, or where no folder can be made."""
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents:
        raise UserError(f"{target}: stands inside of {source}; choose a folder beside it")
    if there in here.parents:
        raise UserError(f"{target}: {source} stands inside of it and would be removed; choose another folder")
    if file := next((parent for parent in target.parents if parent.exists() and not parent.is_dir()), None):
        raise UserError(f"{target}: {file} is a file; choose another folder")


def _check_replaceable(target: Path) -> None:
    """Raises UserError where --force would remove something else than a model."""
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


_FOLDERS_OF_A_MODEL = re.compile(rf"{COMPANIONS}|{CHAT_TEMPLATES}|iter_\d+|release")  # the last two: Megatron-LM's


def _other_things(folder: Path) -> Iterator[Path]:
    """What is neither weights nor travels with a model nor is written by a conversion; links are not followed."""
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


def _verify(source: Path, target: Path, direction: str, workers: int | None) -> None:
    hf, megatron = (source, target) if direction == HF_TO_MEGATRON else (target, source)
    differences = verify(hf, megatron, workers)
    if differences:
        console.print(f"{source} and {target} differ:", style="red", markup=False)
        for line in differences:
            say(f"  {line}")
        raise SystemExit(1)
    say(f"{source} and {target} hold the same model, bit by bit")

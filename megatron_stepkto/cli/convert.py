"""The command line of conversion: ``stepkto convert IN OUT`` and the two tools are the same code."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.progress import console, say
from megatron_stepkto.checkpoints.conversion import convert, direction_of
from megatron_stepkto.checkpoints.convert import HF_TO_MEGATRON
from megatron_stepkto.checkpoints.verify import verify
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
    add_conversion_options(parser)
    guarded(lambda: run_conversion(parser.parse_args(), direction))


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
        raise UserError("OUT is missing: name the folder to write")
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
    began = time.monotonic()
    done = convert(source, target, direction=direction, replace=force, workers=workers)
    if done is None:
        say(f"{target}: already the finished result of {source}; nothing to do")
        return
    seconds = time.monotonic() - began
    say(
        f"{target}: {done.num_tensors} tensors, all finite, {done.weight_bytes / 1e9:.3g} GB "
        f"in {seconds:.1f} s ({done.weight_bytes / 1e9 / seconds:.2g} GB/s)"
    )


def _verify(source: Path, target: Path, direction: str, workers: int | None) -> None:
    hf, megatron = (source, target) if direction == HF_TO_MEGATRON else (target, source)
    differences = verify(hf, megatron, workers)
    if differences:
        console.print(f"{source} and {target} differ:", style="red", markup=False)
        for line in differences:
            say(f"  {line}")
        raise SystemExit(1)
    say(f"{source} and {target} hold the same model, bit by bit")

"""The command line of conversion: ``stepkto convert IN OUT`` and the two tools are the same code.

What takes seconds to import is imported where it is used: every command's ``--help`` reads the options.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.progress import console, say
from megatron_stepkto.cli.arguments import positive
from megatron_stepkto.cli.guard import guarded
from megatron_stepkto.recipe.keys import Parallel

EPILOG = """\
The conversion moves bytes: no weight changes, none is held in memory (about 0.2 GB for a model of any size).
The output appears whole or not at all. It holds conversion.json: size and CRC-32 of every file and tensor.
Config, generation config, tokenizer and chat template travel along; code does not.

exit code 0: done (and equal, with --verify); 1: --verify found differences; 2: input to correct (all faults named)
"""

LAYOUT = ("tensor", "pipeline", "expert", "virtual_pipeline")


def add_conversion_options(parser: argparse.ArgumentParser) -> None:
    """All but IN."""
    parser.add_argument("output", type=Path, metavar="OUT", nargs="?", help="a new folder; not needed with --dry-run")
    parser.add_argument("--force", action="store_true", help="replace OUT, where it is a model")
    parser.add_argument(
        "--verify", action="store_true", help="compare both folders bit by bit, after converting if OUT is not there"
    )
    parser.add_argument("--workers", type=positive, metavar="N", help="threads (default: one per core, at most 8)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="from IN's config.json alone: print the mapping and the bytes per rank of a layout; write nothing",
    )
    layout = parser.add_argument_group("layout for --dry-run")
    layout.add_argument("--tensor", type=positive, metavar="TP", help="tensor parallel size (default 1)")
    layout.add_argument("--pipeline", type=positive, metavar="PP", help="pipeline parallel size (default 1)")
    layout.add_argument("--expert", type=positive, metavar="EP", help="expert parallel size (default 1)")
    layout.add_argument("--virtual-pipeline", type=positive, metavar="VP", help="model chunks per pipeline stage")


def tool(direction: str, description: str | None) -> None:
    """``tools/hf_to_megatron.py`` and ``tools/megatron_to_hf.py``."""
    parser = argparse.ArgumentParser(
        description=description, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="IN")
    add_conversion_options(parser)
    guarded(lambda: run_conversion(parser.parse_args(), direction))


def run_conversion(arguments: argparse.Namespace, direction: str | None = None) -> None:
    """Raises UserError; exits with 1 when --verify finds differences."""
    from megatron_stepkto.checkpoints.conversion import convert, direction_of
    from megatron_stepkto.checkpoints.convert import HF_TO_MEGATRON
    from megatron_stepkto.checkpoints.verify import verify
    from megatron_stepkto.planning.mapping import dry_run

    source, target, workers = arguments.source, arguments.output, arguments.workers
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
        began = time.monotonic()
        done = convert(source, target, direction=direction, replace=arguments.force, workers=workers)
        if done is None:
            say(f"{target}: already the finished result of {source}; nothing to do")
        else:
            size, seconds = done.weight_bytes / 1e9, time.monotonic() - began
            say(
                f"{target}: {done.num_tensors} tensors, all finite, {size:.3g} GB in {seconds:.1f} s "
                f"({size / seconds:.2g} GB/s)"
            )
    if arguments.verify:
        differences = verify(*((source, target) if direction == HF_TO_MEGATRON else (target, source)), workers)
        if differences:
            console.print(f"{source} and {target} differ:", style="red", markup=False)
            for line in differences:
                say(f"  {line}")
            raise SystemExit(1)
        say(f"{source} and {target} hold the same model, bit by bit")


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

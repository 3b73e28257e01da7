"""Options of the commands that convert; in a file of their own, as the conversion takes seconds to import."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_stepkto.cli.arguments import positive

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

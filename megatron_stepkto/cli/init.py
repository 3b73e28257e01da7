"""``stepkto init``: write a first recipe for a model and a file of problems."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_stepkto.cli.arguments import not_negative
from megatron_stepkto.planning.cluster import PRESETS

SAMPLES = 16
NOTES = """files of problems are taken as GSM8K, MATH, NuminaMath, MATH-500 and others ship them: JSON lines, JSON,
parquet, or a folder of them. Rows that cannot be used go to a quarantine file, with file:line and reason."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder, or hub:NAME[@REVISION] to download one")
    parser.add_argument(
        "--problems", type=Path, action="append", required=True, metavar="FILE",
        help="problems with their answers; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--test", type=Path, action="append", default=[], metavar="FILE",
        help="problems to measure on; repeatable (default: a folder's test split, or a tenth of FILE, 500 at most)",
    )  # fmt: skip
    parser.add_argument(
        "--gpus", type=not_negative, metavar="N", help="number of GPUs; 0: CPU only (default: this machine's)"
    )
    parser.add_argument(
        "--cluster", choices=sorted(PRESETS), default="h100", help="GPU type to plan for with --gpus (default h100)"
    )
    parser.add_argument("--output", type=Path, metavar="RECIPE", help="a new YAML file (default: MODEL_FILE.yaml)")
    parser.add_argument(
        "--samples", type=not_negative, default=SAMPLES, metavar="N",
        help=f"solutions to sample, for prompt, steps and limits; 0: none (default {SAMPLES})",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace a recipe and its problem files")


def run(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.first_recipe.make import Wish, make_recipe

    lines = make_recipe(
        Wish(
            model=arguments.model, problems=arguments.problems, tests=arguments.test, output=arguments.output,
            gpus=arguments.gpus, cluster=arguments.cluster, samples=arguments.samples, force=arguments.force,
        )
    )  # fmt: skip
    sys.stdout.write("\n".join(lines) + "\n")

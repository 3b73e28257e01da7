"""Commands of a whole run: init, run, prepare, warm-up, status, report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.progress import say
from megatron_stepkto.cli import init
from megatron_stepkto.cli.arguments import positive
from megatron_stepkto.cli.commands import Commands, add_run_options, methods, recipe_of, run_of
from megatron_stepkto.methods.registry import check_suits


def add_commands(commands: Commands) -> None:
    commands.group("a run")
    first = commands.add(
        "init", init.run, "write a first recipe for a model and a file of problems",
        "stepkto init llama3.1_8b --problems gsm8k_train.jsonl --gpus 8", init.NOTES,
    )  # fmt: skip
    init.add_arguments(first)
    run = commands.add(
        "run", _run, "run a whole recipe; resume it where it stopped",
        "stepkto run recipes/mini_cpu.yaml --iterations 1",
    )  # fmt: skip
    add_run_options(run, "run")
    run.add_argument("--iterations", type=positive, metavar="N", help="instead of the recipe's number")
    run.add_argument(
        "--compare", type=methods, default=[], metavar="METHODS",
        help="also run these methods at the same sample budget, e.g. kto,rft,irpo",
    )  # fmt: skip
    prepare = commands.add(
        "prepare", _prepare, "check the layout, make M0, choose all problems: no GPU needed",
        "stepkto prepare recipes/llama3.1_8b_8xh100.yaml",
    )  # fmt: skip
    add_run_options(prepare, "prepare")
    warm_up = commands.add(
        "warm-up", _warm_up, "make M0 by supervised training (section warm_up)", "stepkto warm-up recipes/mini_cpu.yaml"
    )
    add_run_options(warm_up, "warm-up")
    for name, action, text in (
        ("status", _status, "show a run's stages, progress and table"),
        ("report", _report, "write RUN/report.html"),
    ):
        command = commands.add(name, action, text, f"stepkto {name} runs/mini_cpu")
        command.add_argument("run", type=Path, metavar="RUN", help="a run's folder")


def _run(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.evaluation.table import results_table
    from megatron_stepkto.report.page import write_report
    from megatron_stepkto.run.pipeline import run_all

    recipe = recipe_of(arguments)
    if recipe.train.method in arguments.compare:
        raise UserError(f"--compare {recipe.train.method}: that is the recipe's own method; leave it out")
    for name in arguments.compare:
        check_suits(recipe, name, f"--compare {name}")
    run = run_of(arguments, recipe)
    summary = run_all(run, arguments.compare)
    page = write_report(run.base)
    if summary["iterations"]:
        sys.stdout.write(results_table(summary) + "\n")
    say(f"summary: {run.folder.summary}\nreport:  {page}")


def _prepare(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.run.pipeline import prepare_all

    prepare_all(run_of(arguments))


def _warm_up(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.run.pipeline import warm_up_alone

    run = run_of(arguments, from_scratch=True)
    warm_up_alone(run)
    say(f"M0: {run.model(0)}")


def _status(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.report.status import status_text

    sys.stdout.write(status_text(arguments.run) + "\n")


def _report(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.report.page import write_report

    sys.stdout.write(f"{write_report(arguments.run)}\n")

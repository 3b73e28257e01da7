"""Commands for models without a run: convert, measure, the comparisons, plan."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_stepkto.base.progress import say
from megatron_stepkto.cli import compare as log_probs
from megatron_stepkto.cli import plan
from megatron_stepkto.cli.arguments import positive
from megatron_stepkto.cli.commands import Commands, Moved, add_quarantine, add_set, hide_moved
from megatron_stepkto.cli.convert import EPILOG, add_conversion_options, run_conversion

EXPORT = "export RECIPE --iteration T"


def add_commands(commands: Commands) -> None:
    commands.group("models")
    convert = commands.add(
        "convert", run_conversion, "convert a Hugging Face folder to Megatron's torch_dist, or back",
        "stepkto convert llama3.1_8b llama3.1_8b_megatron --verify", EPILOG,
    )  # fmt: skip
    convert.add_argument(
        "source", type=Path, metavar="IN", action=Moved, to=EXPORT,
        when=lambda path: path.suffix in (".yaml", ".yml"), help="a folder of either kind; it decides the direction",
    )  # fmt: skip
    add_conversion_options(convert)
    hide_moved(convert, "--iteration --method --set", EXPORT)
    measure = commands.add(
        "measure", _measure, "measure any Hugging Face model on data sets",
        "stepkto measure llama3.1_8b --data math500.jsonl --output measured/llama3.1_8b",
    )  # fmt: skip
    _add_measure_options(measure)
    compare = commands.add(
        "compare-evaluations", _compare_evaluations, "compare two models on the same problems, paired",
        "stepkto compare-evaluations runs/mini_cpu/evaluate/M0 runs/mini_cpu/evaluate/M1",
    )  # fmt: skip
    compare.add_argument("first", type=Path, metavar="A", help="an evaluation's folder")
    compare.add_argument("second", type=Path, metavar="B", help="another of the same problems")
    compare.add_argument("--json", action="store_true", help="print numbers instead of a table")
    scores = commands.add(
        "compare-logprobs", log_probs.run_comparison, "compare two copies of a model by the log-probs of some text",
        "stepkto compare-logprobs llama3.1_8b llama3.1_8b_megatron", log_probs.EPILOG,
    )  # fmt: skip
    log_probs.add_comparison_options(scores)
    layouts = commands.add(
        "plan", plan.run, "propose layouts for a model on a cluster, with memory and time",
        "stepkto plan recipes/configs/llama3.3_70b --gpus 64 --check",
    )  # fmt: skip
    plan.add_arguments(layouts)


def _add_measure_options(measure: argparse.ArgumentParser) -> None:
    measure.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder")
    measure.add_argument(
        "--data", action="append", required=True, metavar="SET",
        help="a file of problems, or hub:math500 and the like to download one; repeatable",
    )  # fmt: skip
    measure.add_argument("--output", type=Path, required=True, metavar="DIR", help="for solutions and metrics")
    measure.add_argument("--limit", type=positive, metavar="N", help="take the first N problems of each SET")
    measure.add_argument(
        "--recipe", type=Path, metavar="RECIPE", help="take prompt, sample, judge and evaluate from a recipe"
    )
    add_set(measure, "override a key of prompt, sample, judge or evaluate; repeatable")
    measure.add_argument("--force", action="store_true", help="replace an evaluation made with other settings")
    add_quarantine(measure)


def _measure(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.evaluation.folder import evaluate_folder
    from megatron_stepkto.evaluation.table import results_table

    overrides = list(arguments.set)
    if arguments.limit:
        overrides.append(f"evaluate.num_problems={arguments.limit}")
    row = evaluate_folder(
        arguments.model, arguments.data, arguments.output, overrides, recipe=arguments.recipe,
        force=arguments.force, quarantine=arguments.quarantine,
    )  # fmt: skip
    sys.stdout.write(results_table({"iterations": [row]}) + "\n")
    say(f"metrics by data set, subject and level: {arguments.output / 'results' / 'metrics.json'}")


def _compare_evaluations(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.evaluation.compare import compare_evaluations, comparison_table

    found = compare_evaluations(arguments.first, arguments.second)
    sys.stdout.write((json.dumps(found, indent=1) if arguments.json else comparison_table(found)) + "\n")

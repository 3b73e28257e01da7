"""Commands of one stage of a run: problems, sample, judge, dataset, train, export, evaluate."""

from __future__ import annotations

import argparse
import sys

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.cli.arguments import not_negative, positive
from megatron_stepkto.cli.commands import Commands, Moved, add_run_options, hide_moved, run_of
from megatron_stepkto.methods.registry import METHODS

MEASURE = "measure MODEL --data FILE --output DIR"
# Command -> its stage, by the name of that stage's folder, and what it does.
STAGES = {
    "problems": ("problems", "choose an iteration's problems"),
    "sample": ("sample", "sample K solutions per problem"),
    "judge": ("judge", "label steps and answers"),
    "dataset": ("dataset", "choose examples and KL pairs"),
    "train": ("train", "train on the data set with Megatron-Core"),
    "export": ("convert", "write the trained weights as a Hugging Face folder"),
}


def add_commands(commands: Commands) -> None:
    commands.group("stages of a run, one at a time")
    for name, (stage, text) in STAGES.items():
        command = commands.add(name, _stage, text, f"stepkto {name} recipes/mini_cpu.yaml --iteration 1")
        add_run_options(command, name)
        command.add_argument("--iteration", type=positive, required=True, metavar="T", help="from 1 on")
        _add_method(command)
        command.set_defaults(stage=stage, weights_only=False)
        if name == "train":
            command.add_argument(
                "--weights-only", action="store_true", help="only turn the weights into Megatron's format (no GPU)"
            )
    evaluate = commands.add(
        "evaluate", _evaluate, "measure M_T of a run on held-out problems",
        "stepkto evaluate recipes/mini_cpu.yaml --iteration 0",
        f"Any other model is measured with: stepkto {MEASURE}",
    )  # fmt: skip
    add_run_options(evaluate, "evaluate", action=Moved, to=MEASURE, when=lambda path: path.is_dir())
    evaluate.add_argument("--iteration", type=not_negative, required=True, metavar="T", help="which model: 0 is M0")
    _add_method(evaluate)
    evaluate.add_argument(
        "--sample-only", action="store_true", help="sample the solutions, leave the judging to a later call"
    )
    hide_moved(evaluate, "--data --output --limit", MEASURE)


def _add_method(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", choices=METHODS, help="a compared method; default: the recipe's own")


def _stage(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.run.stages import STAGES as RUN_STAGE
    from megatron_stepkto.run.stages import train_stage

    run = run_of(arguments)
    if run.recipe.problems.source == "imports" and (
        arguments.stage in ("problems", "sample") or arguments.iteration > 1
    ):
        raise UserError(
            f"{arguments.recipe}: problems.source is imports: it has one iteration and no stage problems or sample; "
            "begin with `judge --iteration 1`"
        )
    if arguments.weights_only:
        train_stage(run, arguments.iteration, weights_only=True)
    else:
        RUN_STAGE[arguments.stage](run, arguments.iteration)


def _evaluate(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.evaluation.table import results_table
    from megatron_stepkto.run.stages import evaluate_stage, evaluation_problems_stage, sample_for_evaluation

    run = run_of(arguments)
    if run.recipe.evaluate is None:
        raise UserError(f"{arguments.recipe}: section evaluate is missing; add it (split, num_problems)")
    evaluation_problems_stage(run)
    if arguments.sample_only:
        return sample_for_evaluation(run, arguments.iteration)
    row = evaluate_stage(run, arguments.iteration)
    sys.stdout.write(results_table({"method": run.method, "iterations": [row]}) + "\n")
    return None

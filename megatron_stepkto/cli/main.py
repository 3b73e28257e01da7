"""The command ``stepkto``: one sub-command per stage, ``run`` for all of them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_stepkto import __version__
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.progress import say, warn
from megatron_stepkto.cli import judge_eval as judging
from megatron_stepkto.cli import plan as planning
from megatron_stepkto.cli.arguments import not_negative, positive, positive_number
from megatron_stepkto.cli.compare import add_comparison_command
from megatron_stepkto.cli.conversion_options import LAYOUT, add_conversion_options
from megatron_stepkto.cli.guard import guarded
from megatron_stepkto.methods.registry import METHODS, check_suits, load_checked_recipe
from megatron_stepkto.recipe.command_keys import TAKES, check_overrides
from megatron_stepkto.recipe.keys import Recipe

if TYPE_CHECKING:
    from megatron_stepkto.run.folder import Run

Command = Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 0: done; 1: a stage failed; 2: input to correct; 130 and 143: interrupted, run again to go on."""
    arguments = _parser().parse_args(argv)
    command: Command = arguments.command
    guarded(lambda: command(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stepkto", description="Step-KTO on Megatron-Core (arXiv 2501.10799)")
    parser.add_argument("--version", action="version", version=f"megatron-stepkto {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = _recipe_command(commands, "run", _run, "run a whole recipe; continue it where it stopped")
    run.add_argument("--iterations", type=positive, help="instead of the recipe's number")
    run.add_argument(
        "--compare",
        type=_methods,
        default=[],
        metavar="METHODS",
        help="also run these methods at the same sample budget, e.g. kto,rft,irpo",
    )

    for name, text in (
        ("problems", "choose an iteration's problems"),
        ("sample", "draw K solutions per problem"),
        ("judge", "label steps and answers"),
        ("dataset", "choose examples and KL pairs"),
        ("train", "train on them with Megatron-Core"),
        (
            "convert",
            "Megatron weights to a Hugging Face folder; as `convert IN OUT`, a folder of either kind to the other",
        ),
    ):
        stage = _recipe_command(commands, name, _stage, text)
        stage.add_argument("--iteration", type=positive, required=name != "convert", metavar="T", help="from 1 on")
        stage.add_argument("--method", choices=METHODS, help="a compared method; default: the recipe's own")
        if name == "train":
            stage.add_argument(
                "--weights-only", action="store_true", help="only turn the weights into Megatron's format (no GPU)"
            )
        stage.set_defaults(stage=name)
        if name == "convert":
            stage.add_argument(
                "output", type=Path, nargs="?", metavar="OUT", help="then RECIPE is IN, a model's folder"
            )
            add_conversion_options(stage)
            stage.set_defaults(command=_convert)
    add_comparison_command(commands)
    evaluate = _recipe_command(
        commands, "evaluate", _evaluate,
        "measure M_T of a recipe (a YAML file), or any Hugging Face folder, on held-out problems",
    )  # fmt: skip
    evaluate.add_argument("--iteration", type=not_negative, metavar="T", help="of a recipe: 0 is M0")
    evaluate.add_argument("--method", choices=METHODS, help="of a recipe")
    evaluate.add_argument(
        "--sample-only",
        action="store_true",
        help="of a recipe: sample the solutions, leave the judging to a later call",
    )
    evaluate.add_argument(
        "--data", action="append", default=[], metavar="SET",
        help="for a folder: a file of problems, or hub:math500 to download one; repeatable",
    )  # fmt: skip
    evaluate.add_argument("--output", type=Path, metavar="DIR", help="for a folder: where solutions and metrics go")
    evaluate.add_argument("--limit", type=positive, metavar="N", help="for a folder: the first N problems of each SET")
    compare = commands.add_parser("compare-evaluations", help="two models on the same problems, paired")
    compare.add_argument("first", type=Path, metavar="A", help="an evaluation's folder, such as runs/NAME/evaluate/M0")
    compare.add_argument("second", type=Path, metavar="B")
    compare.add_argument("--json", action="store_true", help="numbers instead of a table")
    compare.set_defaults(command=_compare)
    doctor = commands.add_parser("doctor", help="is this machine (or each node, by srun) fit for the recipe?")
    _add_recipe(doctor)
    doctor.add_argument(
        "--environment", choices=("train", "sample"),
        help="check only what the stages of this environment of a cluster need; default: both",
    )  # fmt: skip
    doctor.set_defaults(command=_doctor, name="doctor")
    _recipe_command(commands, "prepare", _prepare, "check the layout, make M0, choose all problems: no GPU needed")
    _recipe_command(commands, "warm-up", _warm_up, "make M0 from random weights (section warm_up)")

    plan = commands.add_parser("plan", help="propose layouts for a model on a cluster, with memory and time")
    planning.add_arguments(plan)
    plan.set_defaults(command=planning.run)

    judge_eval = commands.add_parser("judge-eval", help="compare a process judge with labels of people")
    judging.add_arguments(judge_eval)
    judge_eval.set_defaults(command=judging.run)

    report = commands.add_parser("report", help="write RUN/report.html")
    report.add_argument("run", type=Path, metavar="RUN", help="a run's folder, such as runs/mini_cpu")
    report.set_defaults(command=_report)
    status = commands.add_parser("status", help="show a run's stages, progress and table")
    status.add_argument("run", type=Path, metavar="RUN")
    status.set_defaults(command=_status)

    check = commands.add_parser(
        "check-answers", help="say of pairs of answers whether they are equal, as the judge does"
    )
    check.add_argument("file", metavar="FILE", help="JSON lines of gold, pred and optionally expected; - reads stdin")
    check.add_argument("--workers", type=positive, default=2, help="processes for what needs computer algebra")
    check.add_argument("--cpu-seconds", type=positive_number, default=3.0, help="limit of one pair; past it: undecided")
    check.set_defaults(command=_check_answers)
    _slurm_commands(commands)
    imports = commands.add_parser("import", help="turn a public step-label file into our records")
    imports.add_argument(
        "format", help="prm800k, math-shepherd, math-aps, processbench, ... (an unknown one lists all)"
    )
    imports.add_argument("file", type=Path, help="as its authors publish it (docs/data.md)")
    imports.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face folder of the model to be trained")
    imports.add_argument("--output", type=Path, required=True, help="folder for problems.jsonl and judged.jsonl")
    imports.add_argument("--quarantine", type=Path, metavar="FILE", help="set bad rows aside there and go on")
    imports.set_defaults(command=_import)
    return parser


def _slurm_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    slurm = commands.add_parser("slurm", help="a run as a chain of Slurm jobs (docs/cluster.md)")
    verbs = slurm.add_subparsers(title="commands", required=True, metavar="COMMAND")
    submit = verbs.add_parser("submit", help="submit what is not done and not in the queue")
    _add_recipe(submit)
    submit.add_argument("--iterations", type=positive, help="instead of the recipe's number")
    submit.add_argument(
        "--site", type=Path, default=Path(os.environ.get("STEPKTO_SITE", "slurm/site.sh")), metavar="FILE",
        help="your cluster's settings, a copy of slurm/site.example.sh (default: $STEPKTO_SITE or slurm/site.sh)",
    )  # fmt: skip
    submit.add_argument("--dry-run", action="store_true", help="print the exact sbatch commands instead")
    submit.set_defaults(command=_slurm_submit, name="slurm submit")
    for name, command, text in (
        ("status", _slurm_status, "each job: state, attempts, progress, why it waits, its log"),
        ("cancel", _slurm_cancel, "cancel this run's jobs and no others"),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("run", type=Path, metavar="RUN", help="a run's folder, such as runs/mini_cpu")
        verb.set_defaults(command=command)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, such as recipes/mini_cpu.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key; repeatable"
    )


def _recipe_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, command: Command, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    _add_recipe(parser)
    parser.add_argument("--force", action="store_true", help="redo stages whose settings or inputs changed")
    if name in TAKES["--from-scratch"]:
        parser.add_argument(
            "--from-scratch", action="store_true", help="make M0 by warm_up, though initial_model is given"
        )
    if name in TAKES["--quarantine"]:
        parser.add_argument("--quarantine", type=Path, metavar="FILE", help="set bad input rows aside there and go on")
    if name in TAKES["--allow-overlap"]:
        parser.add_argument(
            "--allow-overlap", action="store_true", help="train on problems of an evaluation set; the manifest says so"
        )
    parser.set_defaults(from_scratch=False, quarantine=None, allow_overlap=False)
    parser.set_defaults(command=command, name=name)
    return parser


def _methods(text: str) -> list[str]:
    methods = [name.strip() for name in text.split(",")]
    for name in methods:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return methods


def _load(arguments: argparse.Namespace) -> Recipe:
    overrides = list(arguments.set)
    if getattr(arguments, "iterations", None):
        overrides.append(f"iterations={arguments.iterations}")
    recipe = load_checked_recipe(arguments.recipe, overrides)
    check_overrides(arguments.name, arguments.set)  # last: a misspelt key is read by no command
    return recipe


def _run(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.evaluation.table import results_table
    from megatron_stepkto.report import write_report
    from megatron_stepkto.run.folder import Run
    from megatron_stepkto.run.pipeline import run_all

    recipe = _load(arguments)
    if recipe.train.method in arguments.compare:
        raise UserError(f"--compare {recipe.train.method}: that is the recipe's own method; leave it out")
    for name in arguments.compare:
        check_suits(recipe, name, f"--compare {name}")
    run = Run(
        recipe, arguments.from_scratch, arguments.force, arguments.quarantine, allow_overlap=arguments.allow_overlap
    )
    summary = run_all(run, arguments.compare)
    page = write_report(run.base)
    if summary["iterations"]:
        sys.stdout.write(results_table(summary) + "\n")
    say(f"summary: {run.base / 'summary.json'}\nreport:  {page}")


def _one(arguments: argparse.Namespace) -> Run:
    from megatron_stepkto.run.folder import Run

    recipe = _load(arguments)
    method = arguments.method if arguments.method != recipe.train.method else None
    if method:
        check_suits(recipe, method, f"--method {method}")
    return Run(recipe, arguments.from_scratch, arguments.force, arguments.quarantine, method, arguments.allow_overlap)


def _stage(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.run.pipeline import STAGES, train_stage

    run = _one(arguments)
    if run.recipe.problems.source == "imports" and (
        arguments.stage in ("problems", "sample") or arguments.iteration > 1
    ):
        raise UserError(
            f"{arguments.recipe}: problems.source is imports: it has one iteration and no stage problems or sample; "
            "begin with `judge --iteration 1`"
        )
    if getattr(arguments, "weights_only", False):
        train_stage(run, arguments.iteration, weights_only=True)
    else:
        STAGES[arguments.stage](run, arguments.iteration)


def _convert(arguments: argparse.Namespace) -> None:
    if arguments.iteration is not None:
        if arguments.output is not None:
            raise UserError("convert RECIPE --iteration T takes no OUT; convert IN OUT takes no --iteration")
        _refuse(arguments, ("verify", "workers", "dry_run", *LAYOUT), "convert IN OUT")
        _stage(arguments)
        return
    if arguments.recipe.suffix in (".yaml", ".yml"):
        raise UserError(f"convert {arguments.recipe}: --iteration T is missing")
    _refuse(arguments, ("set", "method"), "convert RECIPE --iteration T")
    from megatron_stepkto.cli.convert import run_conversion

    arguments.source = arguments.recipe
    run_conversion(arguments)


def _refuse(arguments: argparse.Namespace, options: Sequence[str], go_with: str) -> None:
    """One command, two uses: an option of the other one is not passed over in silence."""
    if given := [f"--{name.replace('_', '-')}" for name in options if getattr(arguments, name)]:
        raise UserError(f"{', '.join(given)}: expected with `{go_with}` only; leave it out")


def _evaluate_folder(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.evaluation.folder import evaluate_folder, rows_by_data
    from megatron_stepkto.evaluation.table import results_table

    if arguments.iteration is not None:
        raise UserError(f"{arguments.recipe} is a folder: --iteration goes with a recipe")
    _refuse(arguments, ("method", "sample_only", "from_scratch"), "evaluate RECIPE --iteration T")
    if arguments.output is None:
        raise UserError("--output DIR is missing: where solutions and metrics go")
    overrides = list(arguments.set)
    if arguments.limit:
        overrides.append(f"evaluate.num_problems={arguments.limit}")
    row = evaluate_folder(
        arguments.recipe, arguments.data, arguments.output, overrides, force=arguments.force,
        quarantine=arguments.quarantine,
    )  # fmt: skip
    sys.stdout.write(results_table({"iterations": rows_by_data(row)}) + "\n")
    say(f"metrics by data set, subject and level: {arguments.output / 'results' / 'metrics.json'}")


def _compare(arguments: argparse.Namespace) -> None:
    import json

    from megatron_stepkto.evaluation.compare import compare_evaluations, comparison_table

    found = compare_evaluations(arguments.first, arguments.second)
    sys.stdout.write((json.dumps(found, indent=1) if arguments.json else comparison_table(found)) + "\n")


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.recipe.is_dir():
        return _evaluate_folder(arguments)
    from megatron_stepkto.evaluation.table import results_table
    from megatron_stepkto.run.pipeline import evaluate_stage, evaluation_problems_stage, sample_for_evaluation

    _refuse(arguments, ("data", "output", "limit"), "evaluate MODEL")
    if arguments.iteration is None:
        raise UserError("--iteration T is missing: which model of the recipe (0 is M0)")
    run = _one(arguments)
    if run.recipe.evaluate is None:
        raise UserError(f"{arguments.recipe}: section evaluate is missing; add it (split, num_problems)")
    evaluation_problems_stage(run)
    if arguments.sample_only:
        return sample_for_evaluation(run, arguments.iteration)
    row = evaluate_stage(run, arguments.iteration)
    sys.stdout.write(results_table({"method": run.method, "iterations": [row]}) + "\n")
    return None


def _doctor(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.run.folder import Run
    from megatron_stepkto.slurm.doctor import report

    report(Run(_load(arguments)), arguments.environment)


def _prepare(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.run.folder import Run
    from megatron_stepkto.run.pipeline import prepare_all

    prepare_all(
        Run(
            _load(arguments),
            arguments.from_scratch,
            arguments.force,
            arguments.quarantine,
            allow_overlap=arguments.allow_overlap,
        )
    )


def _warm_up(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.run.folder import Run
    from megatron_stepkto.run.pipeline import prepare

    run = Run(
        _load(arguments), from_scratch=True, force=arguments.force, quarantine=arguments.quarantine,
        allow_overlap=arguments.allow_overlap,
    )  # fmt: skip
    prepare(run)
    say(f"M0: {run.model(0)}")


def _report(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.report import write_report

    sys.stdout.write(f"{write_report(arguments.run)}\n")


def _status(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.report.status import status_text

    sys.stdout.write(status_text(arguments.run) + "\n")


def _check_answers(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.cli.check_answers import check_answers

    if not check_answers(arguments.file, arguments.workers, arguments.cpu_seconds, sys.stdout):
        raise SystemExit(2)


def _slurm_submit(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.slurm.commands import submit

    sys.stdout.write(submit(_load(arguments), arguments.site, dry_run=arguments.dry_run) + "\n")


def _slurm_status(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.slurm.commands import status

    sys.stdout.write(status(arguments.run) + "\n")


def _slurm_cancel(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.slurm.commands import cancel

    sys.stdout.write(cancel(arguments.run) + "\n")


def _import(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.judging.imported import run_import
    from megatron_stepkto.recipe.keys import Prompt

    counts = run_import(
        arguments.format, arguments.file, arguments.tokenizer, arguments.output, arguments.quarantine, Prompt()
    )
    for warning in counts.pop("warnings", []):
        warn(warning)
    for name, value in counts.items():
        say(f"{name}: {value}")


if __name__ == "__main__":
    main()

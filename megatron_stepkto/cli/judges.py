"""Commands for judges, answers and records: check-answers, judge-eval, import."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_stepkto.base.progress import say, warn
from megatron_stepkto.cli import judge_eval
from megatron_stepkto.cli.arguments import positive, positive_number
from megatron_stepkto.cli.commands import Commands, add_quarantine, add_recipe, run_of
from megatron_stepkto.methods.registry import METHODS


def add_commands(commands: Commands) -> None:
    commands.group("judges and answers")
    check = commands.add(
        "check-answers", _check_answers, "say whether pairs of answers are equal, as the judge does",
        "stepkto check-answers pairs.jsonl",
    )  # fmt: skip
    check.add_argument(
        "file", metavar="FILE", help="JSON lines with gold, pred and optionally expected; - reads standard input"
    )
    check.add_argument("--workers", type=positive, default=2, help="processes for computer algebra (default 2)")
    check.add_argument(
        "--cpu-seconds", type=positive_number, default=3.0, help="limit of one pair; past it: undecided (default 3)"
    )
    judges = commands.add(
        "judge-eval", judge_eval.run, "compare a process judge with human labels",
        "stepkto judge-eval equations processbench=gsm8k.jsonl --output judged/equations",
    )  # fmt: skip
    judge_eval.add_arguments(judges)


def add_record_commands(commands: Commands) -> None:
    commands.group("records")
    imports = commands.add(
        "import", _import, "turn a public file of step labels into our records",
        "stepkto import processbench gsm8k.jsonl --tokenizer llama3.1_8b --output imported/processbench",
    )  # fmt: skip
    imports.add_argument(
        "format", metavar="FORMAT", help="prm800k, math-shepherd, processbench, ... (an unknown one lists all)"
    )
    imports.add_argument("file", type=Path, metavar="FILE", help="as its authors publish it (docs/data.md)")
    imports.add_argument(
        "--tokenizer", type=Path, required=True, metavar="FOLDER", help="Hugging Face folder of the model to be trained"
    )
    imports.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="for problems.jsonl and judged.jsonl"
    )
    add_quarantine(imports)
    exports = commands.add(
        "export-samples", _export_samples, "write a run's judged samples as a data set for TRL",
        "stepkto export-samples trl-kto recipes/mini_cpu.yaml --iteration 1 --output exported/kto",
        "With prompt.chat, prompts and answers are messages, otherwise texts.",
    )  # fmt: skip
    exports.add_argument("layout", metavar="LAYOUT", help="trl-kto, trl-dpo or trl-stepwise (docs/data.md)")
    add_recipe(exports)
    exports.add_argument("--iteration", type=positive, required=True, metavar="T", help="from 1 on")
    exports.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder: data and README.md")
    exports.add_argument("--file-type", choices=("parquet", "jsonl"), default="parquet", help="default: parquet")
    exports.add_argument("--method", choices=METHODS, help="a compared method; default: the recipe's own")
    exports.set_defaults(from_scratch=False, force=False, quarantine=None, allow_overlap=False)


def _check_answers(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.cli.check_answers import check_answers

    if not check_answers(arguments.file, arguments.workers, arguments.cpu_seconds, sys.stdout):
        raise SystemExit(2)


def _import(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.judging.imported import import_all
    from megatron_stepkto.recipe.keys import Import, Prompt

    counts = import_all(
        [Import(format=arguments.format, path=arguments.file)], arguments.tokenizer, Prompt(),
        arguments.output / "problems.jsonl", arguments.output / "judged.jsonl", quarantine=arguments.quarantine,
    )  # fmt: skip
    for warning in counts.pop("warnings", []):
        warn(warning)
    for name, value in counts.items():
        say(f"{name}: {value}")


def _export_samples(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.judging.exported import export_samples, layout_of

    layout = layout_of(arguments.layout)
    run = run_of(arguments)
    t = arguments.iteration
    imported = run.recipe.problems.source == "imports"
    counts = export_samples(
        layout, run.folder.judged(t), arguments.output, run.tokenizer_folder, run.recipe.prompt,
        problems=run.folder.imported_problems if imported else run.folder.problems(t),
        file_type=arguments.file_type, name=f"{run.recipe.name} iteration {t}",
    )  # fmt: skip
    say(f"{arguments.output}: {', '.join(f'{name}: {value}' for name, value in counts.items())}")

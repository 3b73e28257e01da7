"""``stepkto judge-eval``: a process judge against human labels."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.progress import say
from megatron_stepkto.cli.arguments import positive
from megatron_stepkto.cli.commands import add_quarantine, add_set
from megatron_stepkto.problems.imported.formats import FORMATS
from megatron_stepkto.recipe import file as recipe_file
from megatron_stepkto.recipe import keys as recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "judge", metavar="JUDGE", help="a recipe, a file with its section judge alone, or the name of a rule: equations"
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FORMAT=FILE",
        help="such as processbench=gsm8k.jsonl, mrben=..., bigbench_mistake=...",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="for judge_eval.json and unfinished work"
    )
    add_set(parser, "override a key: judge....=...")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="Hugging Face folder that tokenises the solutions (monte_carlo)",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="output of another judge's judge-eval: compare the two on the same solutions",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="judge the first N solutions of each file")
    add_quarantine(parser)


def run(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.evaluation.judge_table import report_table
    from megatron_stepkto.evaluation.judges import REPORT, judge_eval

    files = [_import(text) for text in arguments.files]
    report = judge_eval(
        _judging(arguments.judge, arguments.set),
        files,
        arguments.output,
        tokenizer=arguments.tokenizer,
        limit=arguments.limit,
        quarantine=arguments.quarantine,
        against=arguments.against,
    )
    sys.stdout.write(report_table(report) + "\n")
    say(f"report: {arguments.output / REPORT}")


def _judging(name: str, overrides: list[str]) -> recipe.Judging:
    """The section judge of a file, or that of a rule given by name: the steps are cut already, by people."""
    path = Path(name)
    if path.is_file():
        return recipe_file.load_judging(path, overrides)
    rules = get_args(recipe.RuleJudge.model_fields["kind"].annotation)
    if name not in rules:
        raise UserError(f"judge-eval: expected a YAML file or one of the rules {', '.join(rules)}, got {name}")
    if overrides:
        raise UserError("judge-eval: --set changes keys of a file; name one instead of a rule")
    return recipe.Judging.model_validate({"split": "line", "process": name})


def _import(text: str) -> recipe.Import:
    format_, separator, path = text.partition("=")
    if not separator:
        raise UserError(f"judge-eval: {text}: expected FORMAT=FILE; formats: {', '.join(FORMATS)}")
    return recipe.Import(format=format_, path=Path(path))

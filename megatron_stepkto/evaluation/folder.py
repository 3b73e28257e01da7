"""``stepkto measure MODEL --data FILE``: measure any Hugging Face folder, without a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import read_json
from megatron_stepkto.base.locks import exclusive_lock
from megatron_stepkto.base.progress import say
from megatron_stepkto.base.records import Problem, read_records, write_records
from megatron_stepkto.base.stage import Result, Stage, run_stage
from megatron_stepkto.evaluation.stage import OUTPUTS, SEED, evaluate_model, evaluation_drawing
from megatron_stepkto.evaluation.table import METRICS, Row
from megatron_stepkto.judging.section import judging_key
from megatron_stepkto.judging.stage import check_judge
from megatron_stepkto.problems.datasets import load_problems, of_set, set_names
from megatron_stepkto.recipe.file import model_evaluation
from megatron_stepkto.recipe.keys import Sampling, deciding
from megatron_stepkto.recipe.prompts import ProblemCheck, Prompts, load_tokenizer


def evaluate_folder(
    model: Path, data: Sequence[str], output: Path, overrides: Sequence[str], *, recipe: Path | None = None,
    force: bool = False, quarantine: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate ``model`` on the problems of all data sets together; returns the row of metrics.

    The settings are those of ``recipe``, else defaults with the model's chat template, changed by ``overrides``.

    The folder ``output`` gets the problems, every judged solution, metrics.json and a manifest with the hashes of
    model and data, prompt, seed and versions. After a kill the same call resumes; of a
    finished evaluation it returns the row.

    Raises:
        UserError: no model, no such data, a setting that does not fit, or ``output`` holds another evaluation.
    """
    if not (model / "config.json").is_file():
        raise UserError(f"{model}: expected a Hugging Face folder, found no config.json")
    if not data:
        raise UserError("--data is missing: name files of problems, or hub:math500 and the like to download them")
    chat = bool(load_tokenizer(model).chat_template)
    settings = model_evaluation(model.resolve().name, chat, overrides, recipe)
    prompts = Prompts.of(settings.prompt, model)
    problems = _problems(data, quarantine, settings.evaluate.num_problems, prompts.check)
    if recipe is None and chat and settings.prompt.chat:
        say(
            "prompts use the model's chat template; --set prompt.chat=false turns it off, and --recipe RECIPE uses a "
            "recipe's prompt"
        )
    asked, results = output / "asked" / "problems.jsonl", output / "results"
    known = list(read_records(asked, Problem)) if asked.is_file() else None
    others = known not in (None, problems) and results.exists()  # a command that is refused leaves no results
    if others and not force:
        raise UserError(f"{output} holds an evaluation of other problems; name another folder, or pass --force")
    if known != problems and not others:
        write_records(asked, problems)

    hashes = output / ".hashes.json"

    def work() -> Result:
        row = evaluate_model(model, settings.name, asked, settings, results, hashes)
        return Result([results / name for name in OUTPUTS], {"dtype": row.get("dtype")})

    key = deciding(settings)
    # not a setting that determines the result, but the keys of finished evaluations hold its default
    key["sample"]["stall_timeout_s"] = Sampling.model_fields["stall_timeout_s"].default
    key["evaluate"]["num_problems"] = len(problems)
    key["judge"] = judging_key(settings.judge, model, hashes)
    stage = Stage(
        f"evaluate {settings.name}", results, {**key, "seed": SEED}, {"model": model, "problems": asked},
        hashes,
    )  # fmt: skip

    def check(file: Path = asked) -> None:
        evaluation_drawing(model, settings.name, file, settings, results).check()
        check_judge(settings.judge, model, results, file)

    if others:
        _replace_problems(asked, problems, check, results)
    run_stage(stage, work, force=force, check=check)
    return dict(read_json(results / METRICS, Row))


def _replace_problems(asked: Path, problems: list[Problem], check: Callable[[Path], None], results: Path) -> None:
    """Replace the problems of an evaluation, which is lost with them: only once nothing refuses the new ones, and while
    no other process works with the old ones.
    """
    draft = asked.with_name(f".{asked.name}.{os.getpid()}")
    try:
        write_records(draft, problems)
        check(draft)
        with exclusive_lock(results / ".lock", str(results), note=say):
            draft.replace(asked)
    finally:
        draft.unlink(missing_ok=True)


def _problems(data: Sequence[str], quarantine: Path | None, limit: int | None, check: ProblemCheck) -> list[Problem]:
    """The first ``limit`` problems of each set, each with the name of its data set and an id that begins with it."""
    return [
        of_set(name, problem)
        for name, source in zip(set_names(data, "--data"), data, strict=True)
        for problem in load_problems(source, quarantine=quarantine, limit=limit, check=check)
    ]

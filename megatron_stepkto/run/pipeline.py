"""The whole run: its stages in order, for the recipe's method and those that it is compared with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_stepkto.base.files import atomic_writer, read_json, write_json
from megatron_stepkto.base.locks import exclusive_lock
from megatron_stepkto.base.progress import say
from megatron_stepkto.base.stage import input_hash
from megatron_stepkto.evaluation.table import METRICS, Row
from megatron_stepkto.recipe import keys as recipes
from megatron_stepkto.recipe.file import recipe_content
from megatron_stepkto.recipe.yaml_text import write_yaml
from megatron_stepkto.run import refusals, warm_up
from megatron_stepkto.run.folder import Run, RunFolder
from megatron_stepkto.run.stages import (
    convert_stage,
    dataset_stage,
    evaluate_stage,
    evaluation_problems_stage,
    import_stage,
    judge_stage,
    merge_stage,
    problems_stage,
    sample_stage,
    train_stage,
)
from megatron_stepkto.run.summary import Summary


def prepare(run: Run, compare: Sequence[recipes.Method] = ()) -> None:
    """Make what the recipe alone determines: the problems of the evaluation and of all iterations, then M0.

    Problems come first: what they show must not be found after hours in which M0 was trained, or in the last iteration.

    Raises:
        UserError: a stage refuses its input, or ``check_prepared`` what was made for the stages that follow.
    """
    _prepare_data(run)
    if run.recipe.problems.source != "imports":
        for t in range(1, run.recipe.iterations + 1):
            problems_stage(replace(run, finished=[]), t)  # `run_iterations` names them, each in its place
    if not run.makes_new_model:
        refusals.check_prepared(run, compare)
    _make_m0(run)
    if run.makes_new_model:  # an M0 of an earlier attempt may be of another architecture
        refusals.check_prepared(run, compare)


def warm_up_alone(run: Run) -> None:
    """Make M0; faults of the evaluation's problems show first."""
    _prepare_data(run)
    _make_m0(run)


def _prepare_data(run: Run) -> None:
    if run.makes_new_model:
        warm_up.tokenizer_stage(run)
    if run.recipe.problems.source == "imports":
        import_stage(run)
    if run.recipe.evaluate:
        evaluation_problems_stage(run)


def _make_m0(run: Run) -> None:
    if run.makes_m0:
        warm_up.make_m0(run)
    if run.model(0) != run.base_model:
        merge_stage(run)


def prepare_all(run: Run) -> None:
    """``prepare`` as a job of its own."""
    # training is another job's, with GPUs that this machine may not have; the packages are this job's
    refusals.refuse(refusals.machine_refusals(run, environment="train", elsewhere=True))
    prepare(run)
    input_hash(run.model(0), run.folder.hashes)


def run_iterations(run: Run) -> list[dict[str, Any]]:
    """Run all iterations of one method; returns the evaluation rows of the models that it measures."""
    last, samples = run.recipe.iterations, run.recipe.problems.source != "imports"
    measured = run.recipe.measured()
    rows = [evaluate_stage(run, 0, sample_next=samples)] if 0 in measured else []
    for t in range(1, last + 1):
        say(f"--- {run.title(t, f'of {last}')} ---")
        if samples:
            problems_stage(run, t)
            sample_stage(run, t)
        judge_stage(run, t)
        dataset_stage(run, t)
        train_stage(run, t)
        convert_stage(run, t)
        if t in measured:
            rows.append(evaluate_stage(run, t, sample_next=samples and t < last))
    return rows


def run_all(run: Run, compare: list[recipes.Method]) -> dict[str, Any]:
    """Run the whole recipe, then the methods to compare it with; writes and returns ``summary.json``.

    Raises:
        UserError: another process works on this run, or a stage refuses its input.
    """
    begun = time.time()
    refusals.refuse(refusals.machine_refusals(run, compare))
    with exclusive_lock(run.folder.lock, str(run.base)):
        prepare(run, compare)
        rows = run_iterations(run)
        for method in compare:
            run_iterations(replace(run, compared=method))
        with atomic_writer(run.folder.recipe) as file:
            write_yaml(recipe_content(run.recipe), file)
        stages = dict(run.finished)
        summary: dict[str, Any] = {
            "recipe": run.recipe.name,
            "seed": run.recipe.seed,
            "method": run.method,
            "iterations": rows,
            "methods": compared_rows(run.folder),
            "stages": [{"name": name, "seconds": m["seconds"], "counts": m["counts"]} for name, m in stages.items()],
            "seconds": round(sum(m["seconds"] for m in stages.values()), 1),
            "seconds_of_this_command": round(time.time() - begun, 1),
        }
        if not summary["methods"]:
            del summary["methods"]
        write_json(run.folder.summary, Summary.model_validate(summary).model_dump(mode="json", exclude_unset=True))
    return summary


def compared_rows(folder: RunFolder) -> dict[str, list[dict[str, Any]]]:
    """Rows of every compared method that the run holds, of earlier commands too; each begins with the shared M0."""
    found: dict[str, list[dict[str, Any]]] = {}
    start = folder.evaluation(0) / METRICS
    for method in folder.others():
        own = [file for t in method.evaluated() if (file := method.evaluation(t) / METRICS).is_file()]
        if own and start.is_file():
            found[str(method.compared)] = [dict(read_json(file, Row)) for file in (start, *own)]
    return found

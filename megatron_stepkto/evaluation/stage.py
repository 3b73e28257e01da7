"""The evaluation of one model: sample, judge, measure."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megatron_stepkto.answers.equivalence import EquivalenceChecker
from megatron_stepkto.base.files import read_json, write_json
from megatron_stepkto.base.records import JudgedSample, Problem, read_records, write_records
from megatron_stepkto.evaluation.majority import answer_comparison
from megatron_stepkto.evaluation.metrics import evaluation_row, problem_results
from megatron_stepkto.evaluation.table import GREEDY, METRICS, Row
from megatron_stepkto.judging.stage import judge_file
from megatron_stepkto.recipe.keys import Recipe
from megatron_stepkto.recipe.model_evaluation import ModelEvaluation
from megatron_stepkto.sampling.draw import Drawing, new_drawing, read_prompts
from megatron_stepkto.sampling.job import Pass

# Not the recipe's seed: all seeds of a recipe, and all its models, are measured with the same random numbers.
SEED = 0
OUTPUTS = (GREEDY, "sampled.jsonl", "problems.jsonl", METRICS)


def evaluation_drawing(
    model: Path, name: str, problems: Path, recipe: Recipe | ModelEvaluation, directory: Path
) -> Drawing:
    """The solutions that an evaluation judges: one greedy and k sampled per problem."""
    evaluation, sampling = recipe.evaluate, recipe.sample
    assert evaluation is not None and sampling is not None, "only a recipe that samples has a section evaluate"
    passes = [
        Pass(name="greedy", num_samples=1, temperature=0, top_p=1),
        Pass(name="sampled", num_samples=evaluation.k, temperature=evaluation.temperature, top_p=evaluation.top_p),
    ]
    # no log-probs, and chunks that do not depend on the K of training
    settings = sampling.model_copy(update={"gap_problems": 0, "num_samples": evaluation.k})
    prompts = read_prompts(problems, recipe.prompt, model)
    title = f"{name}: solving {evaluation.split} problems"
    return new_drawing(
        model, name, prompts, passes, settings, SEED, directory, title=title, used_by=directory / METRICS,
        trained_in=recipe.train.dtype if isinstance(recipe, Recipe) else None,
    )  # fmt: skip


def evaluate_model(
    model: Path,
    name: str,
    problems: Path,
    recipe: Recipe | ModelEvaluation,
    directory: Path,
    hashes: Path | None = None,
) -> dict[str, Any]:
    """Sample, judge and measure; writes ``OUTPUTS`` and returns the content of metrics.json.

    After a kill the same call resumes where it stopped.

    Raises:
        UserError: what ``Drawing`` and ``judge_file`` raise.
    """
    evaluation, judging = recipe.evaluate, recipe.judge
    assert evaluation is not None and judging is not None, "only a recipe that samples has a section evaluate"
    drawn = directory / "drawn"
    if (directory / METRICS).is_file():  # written last; an earlier attempt was killed while tidying up
        shutil.rmtree(drawn, ignore_errors=True)
        return dict(read_json(directory / METRICS, Row))
    drawing = evaluation_drawing(model, name, problems, recipe, directory)
    drawing.draw()
    result = drawing.finish()
    judged: dict[str, list[JudgedSample]] = {}
    for pass_ in drawing.job.passes:
        path = directory / f"{pass_.name}.jsonl"
        judge_file(problems, result.paths[pass_.name], path, model, judging, hashes=hashes)
        judged[pass_.name] = list(read_records(path, JudgedSample))
    groups: dict[str, list[JudgedSample]] = {}
    for sample in judged["sampled"]:
        groups.setdefault(sample.problem_id, []).append(sample)
    with EquivalenceChecker(judging.workers, judging.timeout_s) as checker:
        same = answer_comparison(groups.values(), checker)
        asked = list(read_records(problems, Problem))
        write_records(directory / "problems.jsonl", problem_results(asked, judged["greedy"], judged["sampled"], same))
        row = evaluation_row(name, evaluation.split, asked, judged["greedy"], judged["sampled"], same)
    row["dtype"] = result.counts["dtype"]  # of the sampling
    write_json(directory / METRICS, Row.checked(row))
    shutil.rmtree(drawn, ignore_errors=True)  # the judged rows hold every sample
    return row

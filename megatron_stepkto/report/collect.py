"""Read what a run has produced so far. A missing part becomes a sentence on the page, not an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import find_files, read_json_if_there
from megatron_stepkto.base.records import Problem, read_records
from megatron_stepkto.base.stage import MANIFEST, Manifest
from megatron_stepkto.evaluation.table import GREEDY, METRICS, Row
from megatron_stepkto.report.curves import Training, read_training
from megatron_stepkto.report.judge import AgreementRow, agreement, calibration
from megatron_stepkto.report.solutions import (
    MAX_BYTES,
    MAX_TRAINING_BYTES,
    MAX_TRAINING_SAMPLES,
    Browser,
    PositionShare,
    Solution,
    SolutionsOf,
    choose,
    error_positions,
    read_solutions,
)
from megatron_stepkto.run.folder import RunFolder, model_name
from megatron_stepkto.run.summary import StageRow, Summary
from megatron_stepkto.training.job import LOG_RATIOS
from megatron_stepkto.training.job import METRICS as TRAINING_METRICS


@dataclass(frozen=True)
class Report:
    """All that the page shows. ``trainings`` are by method, ``positions`` by model, in order.

    ``agreement`` and ``calibration`` set the judge against the final answers, over the training samples read.
    """

    summary: Summary
    method: str
    warm_up: Training | None
    trainings: Mapping[str, Sequence[Training]]
    positions: Mapping[str, Sequence[PositionShare]]
    agreement: Sequence[AgreementRow]
    calibration: Sequence[AgreementRow]
    browser: Browser
    missing: Sequence[str]
    warnings: Sequence[str]


def collect(run_dir: Path) -> Report:
    """Read a finished or unfinished run.

    Raises:
        UserError: the folder is not a run, or one of its files does not parse.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: expected the folder of a run, found none; give a folder below runs/")
    own = RunFolder(run_dir)
    begun = [own.m0("train").parent, own.evaluation(0).parent, own.summary]
    if not own.iterations() and not any(path.exists() for path in begun):
        raise UserError(
            f"{run_dir}: expected the folder of a run (summary.json, M0, iteration_1 or evaluate), found "
            "none of them; give a folder below runs/, or start the run with stepkto run"
        )
    summary = _validate_if_there(own.summary, Summary)
    finished = summary is not None
    summary = summary or _partial_summary(own)
    method = summary.method or "this run"
    others = {str(folder.compared): folder for folder in own.others()}
    names = dict.fromkeys(name for name in [*summary.methods, *others] if name in others)
    folders = {method: own} | {name: others[name] for name in names}
    trainings = {
        name: [found for t in folder.iterations() if (found := _training(folder.stage("train", t), f"Iteration {t}"))]
        for name, folder in folders.items()
    }
    solutions = _solutions(folders)
    models = [model for model in solutions if " " not in model]
    ends = dict.fromkeys(models[:1] + models[-1:])
    problems = _problems(own.evaluation_problems) if solutions else {}
    trained, trained_problems = _training_samples(own)
    judged = [solution for by_problem in trained.values() for solution in _all(by_problem)]
    held_out, num_held_out = choose(problems, solutions, MAX_BYTES)
    training, num_training = choose(trained_problems, trained, MAX_TRAINING_BYTES)
    browser = Browser(
        models=list(solutions),
        iterations=list(trained),
        selected=models[-1] if models else next(iter([*solutions, *trained]), None),
        problems=held_out + training,
        num_problems=num_held_out + num_training,
    )
    return Report(
        summary=summary,
        method=method,
        warm_up=_training(own.m0("train"), "Warm-up"),
        trainings={name: rows for name, rows in trainings.items() if rows},
        positions={model: error_positions(_all(solutions[model])) for model in ends},
        agreement=agreement(judged),
        calibration=calibration(judged),
        browser=browser,
        missing=_missing(finished, summary, trainings[method], solutions, problems),
        # those of trainings are beside their curves
        warnings=[
            f"{stage.name}: {warning}"
            for stage in summary.stages
            if not stage.name.endswith("train")
            for warning in stage.counts.get("warnings", [])
        ],
    )


Model = TypeVar("Model", bound=BaseModel)


def _validate_if_there(path: Path, model: type[Model]) -> Model | None:
    content = read_json_if_there(path, model)
    return None if content is None else model.model_validate(content)


def _partial_summary(run: RunFolder) -> Summary:
    """What ``summary.json`` would hold so far, from the stages that are finished."""
    methods = {str(folder.compared): _rows(folder) for folder in run.others()}
    stages = []
    for path in find_files(run.base, MANIFEST):
        if (manifest := read_json_if_there(path, Manifest)) is not None:
            name = str(path.parent.relative_to(run.base))
            stages.append(StageRow.model_validate({**manifest, "name": name}))
    return Summary(
        recipe=run.base.resolve().name,
        iterations=_rows(run),
        methods={name: rows for name, rows in methods.items() if rows},
        stages=stages,
    )


def _rows(run: RunFolder) -> list[Row]:
    found = (_validate_if_there(run.evaluation(t) / METRICS, Row) for t in run.evaluated())
    return [row for row in found if row is not None]


def _training(folder: Path, label: str) -> Training | None:
    path = folder / TRAINING_METRICS
    return read_training(path, label) if _has_content(path) else None


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _solutions(folders: Mapping[str, RunFolder]) -> dict[str, dict[str, list[Solution]]]:
    """Greedy solutions of M0, M1, ... and, for each compared method, of its last model ("kto M3")."""
    found: dict[str, dict[str, list[Solution]]] = {}
    for number, (method, run) in enumerate(folders.items()):
        files = {model_name(t): run.evaluation(t) / GREEDY for t in run.evaluated()}
        whole = [name for name, path in files.items() if _has_content(path)]
        for name in whole if number == 0 else whole[-1:]:
            found[name if number == 0 else f"{method} {name}"] = read_solutions(files[name])
    return found


def _training_samples(run: RunFolder) -> tuple[dict[str, dict[str, list[Solution]]], dict[str, Problem]]:
    """The first judged samples of each iteration, with the log-ratios that its training left, and their problems."""
    samples: dict[str, dict[str, list[Solution]]] = {}
    problems: dict[str, Problem] = {}
    for t in run.iterations():
        if _has_content(run.judged(t)):
            ratios = run.stage("train", t) / LOG_RATIOS if _are_trained_on(run, t) else None
            samples[f"samples {t}"] = read_solutions(run.judged(t), ratios, MAX_TRAINING_SAMPLES)
            problems |= _problems(run.problems(t)) | _problems(run.imported_problems)
    return samples, problems


def _are_trained_on(run: RunFolder, t: int) -> bool:
    """Whether training has seen the judged samples that are there now: they may have been judged again since."""
    judge, dataset = (read_json_if_there(run.stage(name, t) / MANIFEST, Manifest) for name in ("judge", "dataset"))
    if judge is None or dataset is None:
        return True
    judged, used = judge["outputs"].get(run.judged(t).name), dataset["key"]["inputs"].get("judged")
    return judged is None or used is None or judged["sha256"] == used["sha256"]


def _problems(path: Path) -> dict[str, Problem]:
    return {problem.problem_id: problem for problem in read_records(path, Problem)} if path.is_file() else {}


def _all(by_problem: SolutionsOf) -> list[Solution]:
    return [solution for rows in by_problem.values() for solution in rows]


def _missing(
    finished: bool,
    summary: Summary,
    trainings: Sequence[Training],
    solutions: Mapping[str, SolutionsOf],
    problems: Mapping[str, Problem],
) -> list[str]:
    sentences = (
        (finished, "The run is not finished (no summary.json): the page shows what exists so far."),
        (summary.iterations, "No model has been evaluated: no table, no curves per iteration."),
        (trainings, "No training has begun: no training curves."),
        (solutions, "There are no greedy solutions of held-out problems: none to read, no error positions."),
        (
            problems or not solutions,
            "evaluate/problems/problems.jsonl is absent: solutions are shown without their problems.",
        ),
    )
    return [sentence for there, sentence in sentences if not there]

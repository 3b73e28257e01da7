"""Read what a run has produced so far; a part that is absent becomes a sentence, not an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import find_files, numbered, read_json_if_there
from megatron_stepkto.base.records import Problem, read_records
from megatron_stepkto.base.stage import Manifest
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

Interval = tuple[float, float]


class Sampled(BaseModel):
    """The same rates over all k samples per problem."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    accuracy: float | None = None
    accuracy_interval: Interval | None = None
    wrong_step_share_of_correct: float | None = None
    wrong_step_share_of_correct_interval: Interval | None = None
    wrong_step_rate_in_correct: float | None = None
    wrong_step_rate_in_correct_interval: Interval | None = None


class EvaluationRow(BaseModel):
    """One row of the table: fractions in 0..1, 95% intervals, null where nothing could be counted."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    split: str | None = None
    num_problems: int | None = None
    k: int | None = None
    pass_at_1: float | None = None
    pass_at_1_interval: Interval | None = None
    maj_at_k: float | None = None
    maj_at_k_interval: Interval | None = None
    wrong_step_share_of_correct: float | None = None
    wrong_step_share_of_correct_interval: Interval | None = None
    wrong_step_rate_in_correct: float | None = None
    wrong_step_rate_in_correct_interval: Interval | None = None
    num_correct: int | None = None
    truncated_share: float | None = None
    unparsed_share: float | None = None
    undecided_share: float | None = None
    mean_response_tokens: float | None = None
    sampled: Sampled | None = None


class StageRow(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    seconds: float | None = None
    counts: dict[str, Any] = Field(default_factory=dict)


class Summary(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    recipe: str
    seed: int | None = None
    method: str | None = None
    iterations: list[EvaluationRow] = Field(default_factory=list)
    methods: dict[str, list[EvaluationRow]] = Field(default_factory=dict)
    stages: list[StageRow] = Field(default_factory=list)
    seconds: float | None = None


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
        UserError: no run there, or a file of it that does not parse.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: expected the folder of a run, found none; give a folder below runs/")
    begun = [
        *numbered(run_dir, "iteration_"),
        *(run_dir / name for name in ("M0", "evaluate", "summary.json")),
    ]
    if not any(path.exists() for path in begun):
        raise UserError(
            f"{run_dir}: expected the folder of a run (summary.json, M0, iteration_1 or evaluate), found "
            "none of them; give a folder below runs/, or start the run with stepkto run"
        )
    summary = _validate_if_there(run_dir / "summary.json", Summary)
    finished = summary is not None
    summary = summary or _partial_summary(run_dir)
    method = summary.method or "this run"
    begun_methods = sorted(folder.name for folder in (run_dir / "methods").glob("*") if folder.is_dir())
    names = dict.fromkeys(name for name in [*summary.methods, *begun_methods] if name in begun_methods)
    folders = {method: run_dir} | {name: run_dir / "methods" / name for name in names}
    trainings = {name: _trainings(folder) for name, folder in folders.items()}
    solutions = _solutions(folders)
    own = [model for model in solutions if " " not in model]
    ends = dict.fromkeys(own[:1] + own[-1:])
    problems = _problems(run_dir / "evaluate" / "problems" / "problems.jsonl") if solutions else {}
    trained, trained_problems = _training_samples(run_dir)
    judged = [solution for by_problem in trained.values() for rows in by_problem.values() for solution in rows]
    held_out, num_held_out = choose(problems, solutions, MAX_BYTES)
    training, num_training = choose(trained_problems, trained, MAX_TRAINING_BYTES)
    browser = Browser(
        models=list(solutions),
        iterations=list(trained),
        selected=own[-1] if own else next(iter([*solutions, *trained]), None),
        problems=held_out + training,
        num_problems=num_held_out + num_training,
    )
    return Report(
        summary=summary,
        method=method,
        warm_up=_training(run_dir / "M0", "Warm-up"),
        trainings={name: rows for name, rows in trainings.items() if rows},
        positions={model: error_positions(_all(solutions[model])) for model in ends},
        agreement=agreement(judged),
        calibration=calibration(judged),
        browser=browser,
        missing=_missing(finished, summary, trainings[method], solutions, problems),
        # those of trainings stand beside their curves
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


def _partial_summary(run_dir: Path) -> Summary:
    """What ``summary.json`` would hold so far, from the stages that are finished."""
    methods = {path.name: _rows(path) for path in sorted((run_dir / "methods").glob("*"))}
    stages = []
    for path in find_files(run_dir, "manifest.json"):
        if (manifest := read_json_if_there(path, Manifest)) is not None:
            name = str(path.parent.relative_to(run_dir))
            stages.append(StageRow.model_validate({**manifest, "name": name}))
    return Summary(
        recipe=run_dir.resolve().name,
        iterations=_rows(run_dir),
        methods={name: rows for name, rows in methods.items() if rows},
        stages=stages,
    )


def _rows(folder: Path) -> list[EvaluationRow]:
    found = (_validate_if_there(path / "metrics.json", EvaluationRow) for path in numbered(folder / "evaluate", "M"))
    return [row for row in found if row is not None]


def _trainings(folder: Path) -> list[Training]:
    iterations = numbered(folder, "iteration_")
    found = [_training(path, f"Iteration {path.name.removeprefix('iteration_')}") for path in iterations]
    return [training for training in found if training]


def _training(folder: Path, label: str) -> Training | None:
    path = folder / "train" / "metrics.jsonl"
    return read_training(path, label) if path.is_file() and path.stat().st_size else None


def _solutions(folders: Mapping[str, Path]) -> dict[str, dict[str, list[Solution]]]:
    """Greedy solutions of M0, M1, ... and, for each compared method, of its last model ("kto M3")."""
    found: dict[str, dict[str, list[Solution]]] = {}
    for number, (method, folder) in enumerate(folders.items()):
        files = [path / "greedy.jsonl" for path in numbered(folder / "evaluate", "M")]
        files = [path for path in files if path.is_file() and path.stat().st_size]
        for path in files if number == 0 else files[-1:]:
            name = path.parent.name
            found[name if number == 0 else f"{method} {name}"] = read_solutions(path)
    return found


def _training_samples(run_dir: Path) -> tuple[dict[str, dict[str, list[Solution]]], dict[str, Problem]]:
    """The first judged samples of each iteration, with the log-ratios that its training left, and their problems."""
    samples: dict[str, dict[str, list[Solution]]] = {}
    problems: dict[str, Problem] = {}
    for folder in numbered(run_dir, "iteration_"):
        path = folder / "judge" / "judged.jsonl"
        if path.is_file() and path.stat().st_size:
            ratios = folder / "train" / "log_ratios.jsonl"
            samples[f"samples {folder.name.removeprefix('iteration_')}"] = read_solutions(
                path, ratios, MAX_TRAINING_SAMPLES
            )
            problems |= _problems(folder / "problems" / "problems.jsonl")
    return samples, problems


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
    found = []
    if not finished:
        found.append("The run is not finished (no summary.json): the page shows what exists so far.")
    if not summary.iterations:
        found.append("No model has been evaluated: no table, no curves per iteration.")
    if not trainings:
        found.append("No training has begun: no training curves.")
    if not solutions:
        found.append("There are no greedy solutions of held-out problems: none to read, no error positions.")
    elif not problems:
        found.append("evaluate/problems/problems.jsonl is absent: solutions stand without their problems.")
    return found

"""Read what a run has produced so far; a part that is absent becomes a sentence, not an error."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_stepkto.errors import UserError
from megatron_stepkto.files import read_json
from megatron_stepkto.records import Problem, describe, read_records
from megatron_stepkto.report.curves import Training, read_training
from megatron_stepkto.report.solutions import (
    Browser,
    PositionShare,
    Solution,
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
    """All that the page shows. ``trainings`` and ``positions`` are by method and by model, in order."""

    summary: Summary
    method: str
    warm_up: Training | None
    trainings: Mapping[str, Sequence[Training]]
    positions: Mapping[str, Sequence[PositionShare]]
    browser: Browser
    missing: Sequence[str]


def collect(run_dir: Path) -> Report:
    """Read a finished or unfinished run.

    Raises:
        UserError: no run there, or a file of it that does not parse.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: expected the folder of a run, found none; give a folder below runs/")
    begun = [
        *_numbered(run_dir, "iteration_"),
        *(run_dir / name for name in ("M0", "evaluate", "summary.json")),
    ]
    if not any(path.exists() for path in begun):
        raise UserError(
            f"{run_dir}: expected the folder of a run (summary.json, M0, iteration_1 or evaluate), found "
            "none of them; give a folder below runs/, or start the run with stepkto run"
        )
    finished = (run_dir / "summary.json").is_file()
    summary = _validate(run_dir / "summary.json", Summary) if finished else _partial_summary(run_dir)
    method = summary.method or "this run"
    begun_methods = sorted(folder.name for folder in (run_dir / "methods").glob("*") if folder.is_dir())
    names = dict.fromkeys(name for name in [*summary.methods, *begun_methods] if name in begun_methods)
    folders = {method: run_dir} | {name: run_dir / "methods" / name for name in names}
    trainings = {name: _trainings(folder) for name, folder in folders.items()}
    solutions = _solutions(folders)
    own = [model for model in solutions if " " not in model]
    ends = dict.fromkeys(own[:1] + own[-1:])
    problems_file = run_dir / "evaluate" / "problems" / "problems.jsonl"
    problems = (
        {problem.problem_id: problem for problem in read_records(problems_file, Problem)}
        if solutions and problems_file.is_file()
        else {}
    )
    return Report(
        summary=summary,
        method=method,
        warm_up=_training(run_dir / "M0", "Warm-up"),
        trainings={name: rows for name, rows in trainings.items() if rows},
        positions={model: error_positions(solutions[model].values()) for model in ends},
        browser=choose(problems, solutions, own[-1] if own else None),
        missing=_missing(finished, summary, trainings[method], solutions, problems),
    )


def _numbered(folder: Path, prefix: str) -> list[Path]:
    """``iteration_1``, ``iteration_2``, ..., ``iteration_10`` in the order of their numbers."""
    found = [(re.fullmatch(rf"{prefix}(\d+)", path.name), path) for path in folder.glob(f"{prefix}*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


Model = TypeVar("Model", bound=BaseModel)


def _validate(path: Path, model: type[Model]) -> Model:
    try:
        return model.model_validate(read_json(path))
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error)}; remove it and run the recipe again") from None


def _partial_summary(run_dir: Path) -> Summary:
    """What ``summary.json`` would hold so far, from the stages that are finished."""
    methods = {path.name: _rows(path) for path in sorted((run_dir / "methods").glob("*"))}
    stages = []
    for path in run_dir.glob("**/manifest.json"):
        manifest = read_json(path)
        name = str(path.parent.relative_to(run_dir))
        stages.append((path.stat().st_mtime, StageRow.model_validate({**manifest, "name": name})))
    stages.sort(key=lambda item: item[0])
    return Summary(
        recipe=run_dir.resolve().name,
        iterations=_rows(run_dir),
        methods={name: rows for name, rows in methods.items() if rows},
        stages=[stage for _, stage in stages],
    )


def _rows(folder: Path) -> list[EvaluationRow]:
    files = [path / "metrics.json" for path in _numbered(folder / "evaluate", "M")]
    return [_validate(path, EvaluationRow) for path in files if path.is_file()]


def _trainings(folder: Path) -> list[Training]:
    iterations = _numbered(folder, "iteration_")
    found = [_training(path, f"Iteration {path.name.removeprefix('iteration_')}") for path in iterations]
    return [training for training in found if training]


def _training(folder: Path, label: str) -> Training | None:
    path = folder / "train" / "metrics.jsonl"
    return read_training(path, label) if path.is_file() and path.stat().st_size else None


def _solutions(folders: Mapping[str, Path]) -> dict[str, dict[str, Solution]]:
    """Greedy solutions of M0, M1, ... and, for each compared method, of its last model ("kto M3")."""
    found: dict[str, dict[str, Solution]] = {}
    for number, (method, folder) in enumerate(folders.items()):
        files = [path / "greedy.jsonl" for path in _numbered(folder / "evaluate", "M")]
        files = [path for path in files if path.is_file() and path.stat().st_size]
        for path in files if number == 0 else files[-1:]:
            name = path.parent.name
            found[name if number == 0 else f"{method} {name}"] = read_solutions(path)
    return found


def _missing(
    finished: bool,
    summary: Summary,
    trainings: Sequence[Training],
    solutions: Mapping[str, Mapping[str, Solution]],
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

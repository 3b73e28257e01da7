"""Solutions of a run: where their errors are, and the ones that the page carries."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_stepkto.base.records import JudgedSample, Label, LogRatios, Problem, read_records

MAX_POSITIONS = 10  # later steps are pooled: few solutions have them
# Of embedded solutions, for held-out problems and for training problems: the page stays below 6 MB.
MAX_BYTES, MAX_TRAINING_BYTES = 3_000_000, 2_000_000
# Training samples read per iteration: a whole iteration of a large run would take minutes and no page holds it.
MAX_TRAINING_SAMPLES = 4000


@dataclass(frozen=True)
class SolutionStep:
    """``right_votes`` of ``num_votes`` judges called the step right (a vote may be null: it counts as neither).

    ``log_ratio``: sum over the step's tokens of log pi_trained - log pi_ref, in nats. ``members``: label and score of
    each member of a combined judge, by its name.
    """

    label: Label
    text: str
    num_votes: int = 0
    right_votes: int = 0
    log_ratio: float | None = None
    members: Mapping[str, tuple[Label, float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Solution:
    """One solution. The texts of its steps, joined, miss only line breaks."""

    outcome: Label
    answer: str | None
    truncated: bool
    steps: tuple[SolutionStep, ...]

    @property
    def lucky(self) -> bool:
        """Right answer, wrong step: what Step-KTO is meant to remove."""
        return self.outcome == 1 and any(step.label == 0 for step in self.steps)

    def payload(self) -> dict[str, Any]:
        """Steps as arrays [label, text, right votes, votes, log-ratio, {member: [label, score]}], cut after the last
        that says something."""
        steps = []
        for step in self.steps:
            row: list[Any] = [step.label, step.text]
            if step.num_votes or step.log_ratio is not None or step.members:
                row += [step.right_votes, step.num_votes]
            if step.log_ratio is not None or step.members:
                row.append(None if step.log_ratio is None else round(step.log_ratio, 3))
            if step.members:
                row.append({name: [label, score and round(score, 3)] for name, (label, score) in step.members.items()})
            steps.append(row)
        return {**vars(self), "steps": steps}


SolutionsOf = Mapping[str, Sequence[Solution]]
"""Problem id to its solutions."""


@dataclass(frozen=True)
class BrowserProblem:
    """A problem with every source's solutions; a source is a model, or an iteration's training samples."""

    problem_id: str
    problem: str | None
    answer: str | None
    solutions: SolutionsOf

    def payload(self) -> dict[str, Any]:
        solutions = {source: [row.payload() for row in rows] for source, rows in self.solutions.items()}
        return {**vars(self), "solutions": solutions}


@dataclass(frozen=True)
class Browser:
    """The ``problems`` (of ``num_problems``) that the page carries, each with every source's solutions.

    ``models`` gave greedy solutions of held-out problems; ``iterations`` hold the samples that were trained on.
    ``selected`` is the source that it opens with.
    """

    models: Sequence[str]
    iterations: Sequence[str]
    selected: str | None
    problems: Sequence[BrowserProblem]
    num_problems: int

    def payload(self) -> dict[str, Any]:
        return {**vars(self), "problems": [problem.payload() for problem in self.problems]}


@dataclass(frozen=True)
class PositionShare:
    """Judged and wrong steps at one position; the last position may pool all later ones ("10+")."""

    position: str
    num_judged: int
    num_wrong: int


def read_solutions(path: Path, log_ratios: Path | None = None, limit: int | None = None) -> dict[str, list[Solution]]:
    """Problem id to its solutions, in the order of the file; the first ``limit`` of them.

    Raises:
        UserError: a row that is not a judged sample, or not log-ratios, with file:line.
    """
    measured: dict[str, list[float]] = {}
    if log_ratios is not None and log_ratios.is_file():
        # a training leaves those of all its examples, and samples are too large to hold
        ids = {sample.sample_id for sample in itertools.islice(read_records(path, JudgedSample), limit)}
        measured = {row.example_id: row.steps for row in read_records(log_ratios, LogRatios) if row.example_id in ids}
    found: dict[str, list[Solution]] = {}
    for sample in itertools.islice(read_records(path, JudgedSample), limit):
        found.setdefault(sample.problem_id, []).append(solution_of(sample, measured.get(sample.sample_id)))
    return found


def solution_of(sample: JudgedSample, log_ratios: Sequence[float] | None = None) -> Solution:
    """Cut the text where steps begin, so that nothing of it is lost to separators."""
    starts = [0, *(step.start for step in sample.steps[1:])]
    ends = [*starts[1:], len(sample.text)]
    ratios = log_ratios if log_ratios is not None else [None] * len(sample.steps)
    steps = tuple(
        SolutionStep(
            step.label,
            sample.text[a:b].strip("\n\r"),
            len(step.votes or ()),
            (step.votes or []).count(1),
            ratio,
            {name: (member.label, member.score) for name, member in (step.members or {}).items()},
        )
        for step, a, b, ratio in zip(sample.steps, starts, ends, ratios, strict=True)
    )
    return Solution(sample.outcome, sample.extracted_answer, sample.finish_reason == "length", steps)


def error_positions(solutions: Iterable[Solution]) -> list[PositionShare]:
    """Judged and wrong steps by position, over all solutions; positions without a judged step stay out."""
    judged, wrong = [0] * MAX_POSITIONS, [0] * MAX_POSITIONS
    pooled = False
    for solution in solutions:
        for index, step in enumerate(solution.steps):
            if step.label is not None:
                slot = min(index, MAX_POSITIONS - 1)
                pooled = pooled or index > slot
                judged[slot] += 1
                wrong[slot] += step.label == 0
    names = [str(index + 1) for index in range(MAX_POSITIONS)]
    if pooled:
        names[-1] += "+"
    return [PositionShare(*row) for row in zip(names, judged, wrong, strict=True) if row[1]]


def choose(
    problems: Mapping[str, Problem], solutions: Mapping[str, SolutionsOf], max_bytes: int
) -> tuple[list[BrowserProblem], int]:
    """The problems that fit into ``max_bytes`` of JSON, and how many there are; every source keeps the same ones.

    First come problems where some source reached the right answer over a wrong step, then the others; within
    each group the order is that of the files.
    """
    ids = list(dict.fromkeys(key for by_problem in solutions.values() for key in by_problem))
    found = {key: {source: rows[key] for source, rows in solutions.items() if key in rows} for key in ids}

    def lucky(key: str) -> bool:
        return any(solution.lucky for rows in found[key].values() for solution in rows)

    taken: list[BrowserProblem] = []
    room = max_bytes
    for key in sorted(ids, key=lambda key: not lucky(key)):
        known = problems.get(key)
        problem, answer = (known.problem, known.answer) if known else (None, None)
        entry = BrowserProblem(key, problem, answer, found[key])
        room -= len(json.dumps(entry.payload()))
        if room < 0:
            break
        taken.append(entry)
    return taken, len(ids)

"""Greedy solutions of a run: where their errors sit, and the ones that the page carries."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_stepkto.records import JudgedSample, Label, Problem, read_records

MAX_POSITIONS = 10  # later steps are pooled: few solutions have them
MAX_BYTES = 3_500_000  # of embedded solutions: the page stays below 5 MB


@dataclass(frozen=True)
class Solution:
    """One model's greedy solution. ``steps`` holds (label, text); joined, the texts miss only white space."""

    outcome: Label
    answer: str | None
    truncated: bool
    steps: tuple[tuple[Label, str], ...]

    @property
    def lucky(self) -> bool:
        """Right answer, wrong step: what Step-KTO is meant to remove."""
        return self.outcome == 1 and any(label == 0 for label, _ in self.steps)


@dataclass(frozen=True)
class BrowserProblem:
    problem_id: str
    problem: str | None
    answer: str | None
    solutions: Mapping[str, Solution]


@dataclass(frozen=True)
class Browser:
    """The ``problems`` (of ``num_problems``) that the page carries, each with every model's solution.

    ``selected`` is the model that it opens with.
    """

    models: Sequence[str]
    selected: str | None
    problems: Sequence[BrowserProblem]
    num_problems: int


@dataclass(frozen=True)
class PositionShare:
    """Judged and wrong steps at one position; the last position may pool all later ones ("10+")."""

    position: str
    num_judged: int
    num_wrong: int


def read_solutions(path: Path) -> dict[str, Solution]:
    """Problem id to solution, in the order of the file.

    Raises:
        UserError: a row that is not a judged sample, with file:line.
    """
    return {sample.problem_id: solution_of(sample) for sample in read_records(path, JudgedSample)}


def solution_of(sample: JudgedSample) -> Solution:
    """Cut the text where steps begin, so that nothing of it is lost to separators."""
    starts = [0, *(step.start for step in sample.steps[1:])]
    ends = [*starts[1:], len(sample.text)]
    steps = tuple(
        (step.label, sample.text[a:b].strip("\n\r")) for step, a, b in zip(sample.steps, starts, ends, strict=True)
    )
    return Solution(sample.outcome, sample.extracted_answer, sample.finish_reason == "length", steps)


def error_positions(solutions: Iterable[Solution]) -> list[PositionShare]:
    """Judged and wrong steps by position, over all solutions; positions without a judged step stay out."""
    judged, wrong = [0] * MAX_POSITIONS, [0] * MAX_POSITIONS
    pooled = False
    for solution in solutions:
        for index, (label, _) in enumerate(solution.steps):
            if label is not None:
                slot = min(index, MAX_POSITIONS - 1)
                pooled = pooled or index > slot
                judged[slot] += 1
                wrong[slot] += label == 0
    names = [str(index + 1) for index in range(MAX_POSITIONS)]
    if pooled:
        names[-1] += "+"
    return [PositionShare(*row) for row in zip(names, judged, wrong, strict=True) if row[1]]


def choose(
    problems: Mapping[str, Problem],
    solutions: Mapping[str, Mapping[str, Solution]],
    selected: str | None,
    max_bytes: int = MAX_BYTES,
) -> Browser:
    """The problems that fit into ``max_bytes`` of JSON; every model keeps the same ones, to be compared.

    First come problems where some model reached the right answer over a wrong step, then the others; within
    each group the order is that of the files.
    """
    ids = list(dict.fromkeys(key for by_problem in solutions.values() for key in by_problem))
    found = {key: {model: rows[key] for model, rows in solutions.items() if key in rows} for key in ids}
    ranked = sorted(ids, key=lambda key: not any(solution.lucky for solution in found[key].values()))
    taken: list[BrowserProblem] = []
    room = max_bytes
    for key in ranked:
        known = problems.get(key)
        problem, answer = (known.problem, known.answer) if known else (None, None)
        entry = BrowserProblem(key, problem, answer, found[key])
        room -= len(json.dumps(asdict(entry)))
        if room < 0:
            break
        taken.append(entry)
    return Browser(list(solutions), selected, taken, len(ids))

"""Judges that need no model: exact rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import Label
from megatron_stepkto.chained_arithmetic.judge import label_steps
from megatron_stepkto.judging.equations import check_equations
from megatron_stepkto.judging.process.interface import Solution, Verdict, Verdicts


class RuleJudge:
    """Applies a rule to every solution, in several processes; finished labels are kept in ``directory/cache``."""

    def __init__(self, name: str, directory: Path, workers: int) -> None:
        self.name, self._directory, self._workers = name, directory, workers

    def judge(self, solutions: Sequence[Solution]) -> list[Verdicts]:
        from megatron_stepkto.judging.row_tasks import run_task

        rows = [[s.problem.problem, s.text, [[step.start, step.end] for step in s.steps]] for s in solutions]
        found = run_task(
            "labels", {"rule": self.name}, rows, self._directory, self._workers, "judging steps", "solutions"
        )
        return [row if isinstance(row, UserError) else [Verdict(label) for label in row] for row in found]

    def counts(self) -> dict[str, Any]:
        return {}


Spans = Sequence[Sequence[int]]  # first character of each step, and the one behind its last


def _chained_arithmetic(problem: str, text: str, spans: Spans) -> list[Label]:
    """The exact rule of the built-in miniature task."""
    return label_steps(problem, text, [(start, end) for start, end in spans])


def _equations(problem: str, text: str, spans: Spans) -> list[Label]:
    """Right iff the step holds a checkable equation and all it holds are true; None where it holds none."""
    labels: list[Label] = []
    for start, end in spans:
        verdicts = check_equations(text[start:end])
        labels.append((1 if all(verdicts) else 0) if verdicts else None)
    return labels


def _none(problem: str, text: str, spans: Spans) -> list[Label]:
    """Judges no step: what is left is plain KTO."""
    return [None] * len(spans)


RULES: dict[str, Callable[[str, str, Spans], list[Label]]] = {
    "chained_arithmetic": _chained_arithmetic,
    "equations": _equations,
    "none": _none,
}

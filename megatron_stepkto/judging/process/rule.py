"""Judges that need no model: exact rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_stepkto.chained_arithmetic.judge import label_steps
from megatron_stepkto.errors import UserError
from megatron_stepkto.judging.equations import check_equations
from megatron_stepkto.judging.process.interface import Solution, Verdict, Verdicts
from megatron_stepkto.progress import ProgressBar
from megatron_stepkto.records import Label


class RuleJudge:
    """Applies a rule to one solution after another."""

    def __init__(self, name: str, rule: Callable[[Solution], list[Label]]) -> None:
        self.name, self._rule = name, rule

    def judge(self, solutions: Sequence[Solution]) -> list[Verdicts]:
        judged: list[Verdicts] = []
        with ProgressBar("judging steps", len(solutions), "solutions") as bar:
            for number, solution in enumerate(solutions, 1):
                try:
                    judged.append([Verdict(label) for label in self._rule(solution)])
                except UserError as error:
                    judged.append(error)
                bar.update(number)
        return judged

    def counts(self) -> dict[str, Any]:
        return {}


def _chained_arithmetic(solution: Solution) -> list[Label]:
    """The exact rule of the built-in miniature task."""
    return label_steps(solution.problem.problem, solution.text, [(step.start, step.end) for step in solution.steps])


def _equations(solution: Solution) -> list[Label]:
    """Right iff the step holds a checkable equation and all it holds are true; None where it holds none."""
    labels: list[Label] = []
    for text in solution.step_texts:
        verdicts = check_equations(text)
        labels.append((1 if all(verdicts) else 0) if verdicts else None)
    return labels


def _none(solution: Solution) -> list[Label]:
    """Judges no step: what is left is plain KTO."""
    return [None] * len(solution.steps)


RULES: dict[str, Callable[[Solution], list[Label]]] = {
    "chained_arithmetic": _chained_arithmetic,
    "equations": _equations,
    "none": _none,
}

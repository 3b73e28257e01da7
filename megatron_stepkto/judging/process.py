"""Process judges: which steps of a solution are right."""

from __future__ import annotations

from typing import Protocol

from megatron_stepkto.chained_arithmetic.judge import label_steps
from megatron_stepkto.errors import UserError
from megatron_stepkto.judging.equations import check_equations
from megatron_stepkto.records import Label, Problem


class ProcessJudge(Protocol):
    """Labels the steps ``text[start:end]`` of a solution: 1 right, 0 wrong, None not judged."""

    @property
    def name(self) -> str: ...

    def label(self, problem: Problem, text: str, spans: list[tuple[int, int]]) -> list[Label]: ...


class ChainedArithmeticJudge:
    """The exact rule of the built-in miniature task."""

    name = "chained_arithmetic"

    def label(self, problem: Problem, text: str, spans: list[tuple[int, int]]) -> list[Label]:
        return label_steps(problem.problem, text, spans)


class EquationsJudge:
    """Right iff the step holds a simple equation and all it holds are true; None where it holds none."""

    name = "equations"

    def label(self, problem: Problem, text: str, spans: list[tuple[int, int]]) -> list[Label]:
        labels: list[Label] = []
        for start, end in spans:
            verdicts = check_equations(text[start:end])
            labels.append((1 if all(verdicts) else 0) if verdicts else None)
        return labels


class NoJudge:
    """Judges no step: what is left is plain KTO."""

    name = "none"

    def label(self, problem: Problem, text: str, spans: list[tuple[int, int]]) -> list[Label]:
        return [None] * len(spans)


_JUDGES: dict[str, type[ProcessJudge]] = {
    judge.name: judge for judge in (ChainedArithmeticJudge, EquationsJudge, NoJudge)
}


def process_judge(name: str) -> ProcessJudge:
    """The process judge of that name.

    Raises:
        UserError: there is none; lists those there are.
    """
    if name not in _JUDGES:
        raise UserError(f"judge.process: expected one of {', '.join(_JUDGES)}, got {name!r}")
    return _JUDGES[name]()

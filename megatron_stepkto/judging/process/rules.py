"""The rules that label the steps of one solution without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_stepkto.base.records import Label
from megatron_stepkto.judging.equation_context import Subject
from megatron_stepkto.judging.equations import MAX_CONTEXT, check_equations
from megatron_stepkto.judging.formulas import formula_verdicts
from megatron_stepkto.problems.chained_arithmetic.judge import label_steps

Spans = Sequence[Sequence[int]]  # first character of each step, and the one behind its last


def _chained_arithmetic(problem: str, text: str, spans: Spans) -> list[Label]:
    """The exact rule of the built-in miniature task."""
    return label_steps(problem, text, [(start, end) for start, end in spans])


def _equations(problem: str, text: str, spans: Spans) -> list[Label]:
    """Wrong iff the step holds an equation that is false beyond doubt; right iff it holds a checkable equation and
    all that it holds are true; None where it holds none, or one that is false only as read."""
    labels: list[Label] = []
    subject = Subject(problem, text)
    of_formulas = formula_verdicts(problem, text, spans, subject)
    for (start, end), verdicts in zip(spans, of_formulas, strict=True):
        verdicts += check_equations(
            text[start:end], text[max(0, start - MAX_CONTEXT) : start], text[end : end + MAX_CONTEXT], subject=subject
        )
        if False in verdicts:
            labels.append(0)
        else:
            labels.append(1 if verdicts and all(verdicts) else None)
    return labels


def _none(problem: str, text: str, spans: Spans) -> list[Label]:
    """Judges no step: what is left is plain KTO."""
    return [None] * len(spans)


RULES: dict[str, Callable[[str, str, Spans], list[Label]]] = {
    "chained_arithmetic": _chained_arithmetic,
    "equations": _equations,
    "none": _none,
}

"""A judged solution of any source, and what the parsers of the public layouts share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from megatron_stepkto.answers.text import normalise
from megatron_stepkto.base.records import Label, Record, written


class Turn(Record):
    """One message of a conversation."""

    role: str
    content: str


class ImportedSolution(Record):
    """One judged solution.

    ``steps`` are texts with their separators: joined they are the solution, character for character.
    ``finished`` is false where the source holds only the beginning of a solution: it gets no end token.
    ``problem_id`` depends on the problem's text alone, so the same problem of two sources has the same one.
    ``turns``: the messages of a prompt that is a longer conversation than one question.
    """

    problem_id: str
    problem: str
    answer: str | None
    solution_id: str
    steps: tuple[str, ...]
    labels: tuple[Label, ...]
    outcome: Label
    source: str
    finished: bool = True
    turns: tuple[Turn, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.problem.strip():
            raise ValueError("the problem is empty; give its text")
        if not self.text.strip():
            raise ValueError("the solution is empty; give at least one step with text")
        for name, text in (("problem", self.problem), ("solution", self.text)):
            try:
                written(text)
            except ValueError as error:
                raise ValueError(f"the {name} {error}") from None
        if len(self.labels) != len(self.steps):
            raise ValueError(f"expected one label per step, got {len(self.labels)} labels for {len(self.steps)} steps")
        if blank := [number for number, step in enumerate(self.steps) if not step.strip()]:
            raise ValueError(f"step {blank[0]} (counted from 0) has no text; give it or remove the step")
        return self

    @property
    def text(self) -> str:
        return "".join(self.steps)


class ImportedRow(Record):
    """What one row of a file holds: solutions, or the reason for which it holds none on purpose."""

    solutions: tuple[ImportedSolution, ...] = ()
    skipped: str | None = None


class Layout(BaseModel):
    """A raw row. Keys that are not needed are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


def problem_id_of(problem: str) -> str:
    """Identity of a problem: 64 bits of the SHA-256 of its text, runs of white space counted as one space."""
    return "p" + digest(" ".join(problem.split()))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def solution(
    source: str, number: str, problem: str, answer: str | None, steps: Sequence[str], labels: Sequence[Label],
    outcome: Label, *, finished: bool = True, turns: tuple[Turn, ...] = (),
) -> ImportedSolution:  # fmt: skip
    return ImportedSolution(
        problem_id=problem_id_of(problem),
        problem=problem,
        answer=(answer or "").strip() or None,
        solution_id=f"{source}/{number}",
        steps=tuple(steps),
        labels=tuple(labels),
        outcome=outcome,
        source=source,
        finished=finished,
        turns=turns,
    )


def one_solution(*arguments: Any, **options: Any) -> ImportedRow:
    return ImportedRow(solutions=(solution(*arguments, **options),))


def joined(steps: Sequence[str], separator: str) -> list[str]:
    """Append to every step but the last the separator that was between it and the next."""
    return [*(step + separator for step in steps[:-1]), *steps[-1:]]


def without_blanks(steps: Sequence[str], labels: Sequence[Label]) -> tuple[list[str], list[Label]]:
    """Join a step of white space alone to the step before it: it is an empty line, not a step."""
    kept: list[str] = []
    kept_labels: list[Label] = []
    for step, label in zip(steps, labels, strict=True):
        if kept and not step.strip() and label != 0:
            kept[-1] += step
        else:
            kept.append(step)
            kept_labels.append(label)
    return kept, kept_labels


def until_first_error(num_steps: int, first_error: int | None) -> list[Label]:
    """1 before the first error, 0 at it, null after it: people stop judging there."""
    if first_error is None:
        return [1] * num_steps
    if not 0 <= first_error < num_steps:
        raise ValueError(f"first error {first_error} (counted from 0) is outside the {num_steps} steps")
    return [1 if step < first_error else 0 if step == first_error else None for step in range(num_steps)]


def _number(text: str) -> Fraction | None:
    try:
        # an exponent could make a number too big for memory
        return Fraction(text) if len(text) < 100 and "e" not in text.lower() else None
    except (ValueError, ZeroDivisionError):
        return None


def same_answer(given: str | None, gold: str | None) -> Label:
    """1: the same normal form; 0: both are numbers and differ; null: undecided without computer algebra."""
    if given is None or gold is None:
        return None
    given, gold = normalise(given), normalise(gold)
    if given == gold:
        return 1
    numbers = _number(given), _number(gold)
    return None if None in numbers else 1 if numbers[0] == numbers[1] else 0

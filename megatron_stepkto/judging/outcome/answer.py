"""The outcome judge: is the final answer of each solution the right one?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_stepkto.answers.equivalence import EquivalenceChecker
from megatron_stepkto.answers.text import extract_answer
from megatron_stepkto.base.records import Label


@dataclass(frozen=True)
class Outcome:
    """``extracted`` is None where the text states no answer, which is wrong; an undecided label is None.

    ``score``: of the reward model where that decided.
    """

    label: Label
    extracted: str | None
    how: str
    score: float | None = None


def judge_outcomes(
    texts: Sequence[str],
    golds: Sequence[str],
    checker: EquivalenceChecker,
    progress: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """One outcome per (solution text, gold answer)."""
    extracted = [extract_answer(text) for text in texts]
    pairs = [(gold, answer) for gold, answer in zip(golds, extracted, strict=True) if answer is not None]
    verdicts = iter(checker.check_many(pairs, progress))
    outcomes = []
    for answer in extracted:
        if answer is None:
            outcomes.append(Outcome(0, None, "no answer"))
        else:
            verdict = next(verdicts)
            outcomes.append(Outcome(verdict.label, answer, verdict.how))
    return outcomes

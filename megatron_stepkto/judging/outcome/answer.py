"""The outcome judge: is the final answer of each solution the right one?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_stepkto.answers.equivalence import EquivalenceChecker
from megatron_stepkto.answers.final_answer import extract_answer
from megatron_stepkto.base.records import Label


@dataclass(frozen=True)
class Outcome:
    """``extracted`` is None where the text states no answer, which is wrong; an undecided label is None.

    ``how``: of the verdict, "no answer" or the reward model's name. ``score``: of the reward model where that decided.
    ``milliseconds`` of CPU time of the comparison.
    """

    label: Label
    extracted: str | None
    how: str
    score: float | None = None
    milliseconds: float = 0.0


def judge_outcomes(
    texts: Sequence[str],
    golds: Sequence[str],
    checker: EquivalenceChecker,
    progress: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """One outcome per (solution text, gold answer): of every stage and of ``stepkto check-answers``.

    A text is a whole solution or a bare answer ("18 dollars"), whichever ``extract_answer`` takes it for. A gold is an
    answer: nothing is extracted from it.
    """
    extracted = [extract_answer(text) for text in texts]
    pairs = [(gold, answer) for gold, answer in zip(golds, extracted, strict=True) if answer is not None]
    decided = (
        Outcome(verdict.label, answer, verdict.how, milliseconds=verdict.milliseconds)
        for (_, answer), verdict in zip(pairs, checker.check_many(pairs, progress), strict=True)
    )
    return [Outcome(0, None, "no answer") if answer is None else next(decided) for answer in extracted]

"""The judges that need no model and no folder, for texts at hand: in a notebook or another program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_stepkto.answers.equivalence import EquivalenceChecker
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import Label
from megatron_stepkto.judging.outcome.answer import Outcome, judge_outcomes
from megatron_stepkto.judging.process.rules import RULES
from megatron_stepkto.steps.text import SplitRule, split_text

CPU_SECONDS = 3.0  # of one comparison, as judge.timeout_s


class LabelledStep(NamedTuple):
    """``text`` of the step, and its label: 1 right, 0 wrong, None not judged."""

    text: str
    label: Label


def judge_answer(text: str, gold: str, *, cpu_seconds: float = CPU_SECONDS) -> Outcome:
    """Is the final answer that ``text`` states equal to ``gold``?

    The verdict is that of every stage and of ``stepkto check-answers``. A pair that needs computer algebra starts a
    process, which takes seconds: give many pairs to ``judge_answers``.

    Args:
        text: a whole solution, or a bare answer ("18 dollars").
        gold: the right answer; nothing is extracted from it.
        cpu_seconds: limit of the comparison; past it the answer is undecided.

    Returns:
        ``label`` 1 right, 0 wrong, None undecided; ``extracted``, the answer that was found (None: there is none, which
        is wrong); ``how`` it was decided.
    """
    return judge_answers([text], [gold], cpu_seconds=cpu_seconds, workers=1)[0]


def judge_answers(
    texts: Sequence[str], golds: Sequence[str], *, cpu_seconds: float = CPU_SECONDS, workers: int = 2
) -> list[Outcome]:
    """``judge_answer`` of each pair, in order.

    Args:
        workers: processes at most for the pairs that need computer algebra.

    Raises:
        UserError: the lists differ in length, or hold something other than texts.
    """
    if isinstance(texts, str) or isinstance(golds, str) or len(texts) != len(golds):
        raise UserError("expected one gold answer per text: two lists of the same length")
    for name, values in (("text", texts), ("gold", golds)):
        for value in values:
            _check_text(name, value)
    with EquivalenceChecker(workers, cpu_seconds) as checker:
        return judge_outcomes(texts, golds, checker)


def label_steps(
    text: str, rule: str = "equations", *, problem: str = "", split: SplitRule = "line", tag: str | None = None
) -> list[LabelledStep]:
    """Split a solution into steps and label each by a rule that needs no model.

    Args:
        text: the solution. The texts of the steps join to it, character for character.
        rule: "equations" (the exact arithmetic of a step's equations), "chained_arithmetic" (the miniature, which
            needs ``problem``) or "none".
        problem: its text; "equations" reads in it which kind of arithmetic is meant.
        split: where a step ends, as the key judge.split; "tag" needs ``tag``.

    Raises:
        UserError: an unknown rule or split, or a problem that the rule does not know.
    """
    _check_text("text", text)
    _check_text("problem", problem)
    if rule not in RULES:
        raise UserError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    spans = split_text(text, split, tag)
    labels = RULES[rule](problem, text, spans)
    return [LabelledStep(text[start:end], label) for (start, end), label in zip(spans, labels, strict=True)]


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise UserError(f"{name}: expected a text (str), got {value!r:.60} ({type(value).__name__})")

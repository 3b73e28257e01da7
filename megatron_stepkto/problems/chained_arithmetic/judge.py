"""The exact rule that judges the steps of a chained-arithmetic solution."""

from __future__ import annotations

import re

from megatron_stepkto.base.records import Label
from megatron_stepkto.problems.chained_arithmetic.generate import Chain, parse

ANSWER = "Answer: "
_STEP = re.compile(r"(\w+) has (\d{1,4}) ([-+*]) (\d{1,4}) = (\d{1,4})\.\n?", re.ASCII)


def label_step(chain: Chain, step: str) -> Label:
    """1 iff the line is the one equation of that name: its left value, operator, operand and result."""
    match = _STEP.fullmatch(step)
    if not match:
        return 0
    name, left, op, operand, result = match.groups()
    link = next((link for link in chain.links if link.name == name), None)
    written = (int(left), op, int(operand), int(result))
    return 1 if link and written == (link.left, link.op, link.operand, link.result) else 0


def label_steps(problem_text: str, text: str, spans: list[tuple[int, int]]) -> list[Label]:
    """Labels of the steps ``text[start:end]``.

    The answer line and whatever follows it are null: the outcome judges them.

    Raises:
        UserError: the problem is not one of this task.
    """
    chain = parse(problem_text)
    labels: list[Label] = []
    answered = False
    for start, end in spans:
        step = text[start:end]
        answered = answered or step.startswith(ANSWER)
        labels.append(None if answered else label_step(chain, step))
    return labels

"""A simulated student with habitual mistakes: the writer of the corpus that the first model learns from.

Three habits: a dropped carry (17 + 5 = 12), the smaller digit from the larger (23 - 5 = 22), and "k times"
read as "k more". Each (operation, operand) has its own rate between 0.1 and 0.8; rates above one half make
a mistake the likelier line, or greedy decoding would hide it. After a mistake the next line often continues
silently from the right value: such solutions reach the right answer through a wrong step, the case that an
outcome label cannot see.
"""

from __future__ import annotations

import random

from megatron_stepkto.base.records import Problem
from megatron_stepkto.problems.chained_arithmetic.generate import (
    Chain,
    Link,
    Operator,
    answer_line,
    apply,
    equation,
    generate,
    parse,
)

MIN_FLAW_RATE, MAX_FLAW_RATE = 0.1, 0.8
SILENT_REPAIR = {"+": 0.6, "-": 0.4, "*": 0.35}  # chance that the next line starts from the right value
SLIP_RATE, SLIP_REPAIR = 0.02, 0.5
MAX_WRITTEN = 297  # three digits at most: accumulated errors are clipped to the task's range


def flaw_rate(op: Operator, operand: int) -> float:
    """How often the habit of this operation is followed where it can be; graded, so that no rule covers all."""
    grades = {2: 0.4, 3: 0.7} if op == "*" else {k: (5 * k + (3 if op == "-" else 0)) % 8 / 7 for k in range(2, 10)}
    return MIN_FLAW_RATE + (MAX_FLAW_RATE - MIN_FLAW_RATE) * grades[operand]


def habit(op: Operator, left: int, operand: int) -> tuple[Operator, int] | None:
    """(operator, result) that the habit writes for ``left op operand``; None where it makes no difference."""
    if op == "+":
        return ("+", left + operand - 10) if left % 10 + operand >= 10 else None
    if op == "-":
        return ("-", left // 10 * 10 + operand - left % 10) if left % 10 < operand else None
    return ("+", left + operand) if left + operand != left * operand else None


def _write_line(link: Link, left: int, rng: random.Random) -> tuple[Operator, int, int]:
    """(operator, result as written, value the next line starts from), given what the student has so far."""
    right = apply(link.op, left, link.operand)
    op, written, carried = link.op, right, right
    flawed = habit(link.op, left, link.operand)
    if flawed and rng.random() < flaw_rate(link.op, link.operand):
        op, written = flawed
        carried = right if rng.random() < SILENT_REPAIR[link.op] else written
    elif rng.random() < SLIP_RATE:
        written = max(0, right + rng.choice((-1, 1)))
        carried = right if rng.random() < SLIP_REPAIR else written
    if not 0 <= written <= MAX_WRITTEN or carried < 0:
        written = carried = max(0, min(carried, 99))
    return op, written, carried


def write_solution(chain: Chain, rng: random.Random) -> str:
    """A solution as the student writes it, with the answer line."""
    lines = []
    value = chain.start_value
    for link in chain.links:
        op, written, carried = _write_line(link, value, rng)
        lines.append(equation(link.name, value, op, link.operand, written))
        value = carried
    return "".join(lines) + answer_line(value)


def corpus(count: int, seed: int) -> list[tuple[Problem, str]]:
    """``count`` train-split problems, each with the student's solution of it."""
    rng = random.Random(f"chained_arithmetic student {seed}")
    return [(problem, write_solution(parse(problem.problem), rng)) for problem in generate("train", count, seed)]

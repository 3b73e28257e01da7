"""Process judges: equations in running text, and the judges by name."""

from __future__ import annotations

import tempfile
import tracemalloc
from itertools import accumulate
from pathlib import Path

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import Label, Problem, Step
from megatron_stepkto.judging.equations import check_equations
from megatron_stepkto.judging.process.interface import Solution, Workplace
from megatron_stepkto.judging.process.registry import process_judge
from megatron_stepkto.recipe.keys import RuleJudge

PROBLEM = Problem(
    problem_id="p", problem="Max has 27 coins. Tom has 2 more than Max. How many does Tom have?", answer="29"
)


@pytest.mark.parametrize(
    ("text", "verdicts"),
    [
        ("12 * 3 = 36", [True]),
        ("12 * 3 = 35", [False]),
        ("$5 + $6 = $11", [True]),
        ("She has 2 x $30 = $<<2*30=60>>60.", [True]),
        ("<<100/5=20.0>>20 dollars", [True]),
        (r"$12 \cdot 3 = 36$.", [True]),
        ("24 ÷ 6 = 4 and 4 × 2 = 9", [True, False]),
        ("1,200 + 300 = 1,500", [True]),
        ("2(3+1) = 8", [True]),
        ("2 + 3 * 4 = 14, not 20", [True]),
        ("-5 + 3 = -2", [True]),
        ("7 = 3 + 4", [True]),
        ("3 + 4 = 7 + 2 = 9", [False, True]),
        ("10/3 = 3.33", [True]),  # rounded to the decimals shown
        ("10/3 = 3.34", [False]),
        ("10/3 = 3", [None]),  # a quotient whose remainder is told apart, or a rounded value
        ("8/2 = 3", [False]),
        ("41/0.14 = 293", [None]),
        ("2/3 = 0.66", [None]),  # digits cut off
        (r"$9 \div 7 = 1$ with a remainder of $2$", [None]),
        ("(3,200 - 4,800) / 4,800 * 100 = -33%", [None]),
        (r"\[ 16 = 13 - 12 \cos C \]", []),
        (r"9 = 20 - 16 \cos B, 3 + 4 = 8", [False]),
        ("12 = 5 + 3 x and more", []),
        ("12 = 5 + 3 in all", [False]),
        (r"\sum_{h=1}^{12} 8 = 8 \times 12 = 96", [True]),
        (r"f''(4) = 48 - 16 > 0", []),
        (r"m \circ 2 = \frac{1}{2}", []),
        (r"\implies 2 + 2 = 5", [False]),
        (r"\text{Cost: } 2 + 2 = 5", [False]),
        (r"\frac{6}{3} = 2 = \boxed{5 - 3}", [True]),
        (r"3 \times 4 = \boxed{13}", [False]),
        (r"2\frac{1}{2} = 2.5", []),  # a mixed number, or a product?
        (r"\frac{1}{2} + \frac{1}{3} = \dfrac{5}{6}", [True]),
        ("20% * 50 = 10", [True]),
        ("10/50 * 100 = 20%", [True]),
        ("10/50 = 20%", [True]),
        ("100 - 20% = 80", [None]),  # open to reading
        ("5/0 = 3", [False]),
        ("1. 2 + 2 = 4", [True]),
        ("- 5 + 3 = 8", [True]),  # a list item, not minus five
        ("1) 2 + 2 = 5", [False]),
        ("x = 5 - 3 = 2", [True]),
        ("**3 + 4 = 7**", [True]),
        ("2x + 3 = 7", []),
        ("x - 5 = 3", []),
        ("x+4*x = 100", []),
        ("2^3 + 1 = 9", [True]),
        ("2**3 = 8", []),
        ("5! + 1 = 121", [True]),
        ("1/2 of 10 + 2 = 7", []),
        ("5 apples + 3 apples = 8 apples", [True]),
        (r"\frac{1}{2} + 3 = 5", [False]),
        (r"\frac{1}{x} + 3 = 4", []),
        ("5 >= 3 + 1", []),
        ("3:00 + 2 = 5", []),
        ("36cm = 6*6cm", []),
        (r"25\% \text{ of } \$2,000 = 0.25 \times 2000 = \$500", [True]),
        ("¾ x 3/3 = 9/12", []),
        ("6 = 6", []),
        ("no numbers", []),
        ("5 apples + 3 apples = 8 apples in all", [True]),
        ("5 apples + 3 apples = 9 apples", []),
        ("4 boxes * 6 eggs = 24 eggs, then 24 eggs - 4 eggs = 20 eggs.", [True, True]),
        ("356 times + 135 times = 491", []),
        ("half of 10 miles + 2 miles = 12 miles", []),
        ("12 x = 4 * 3", []),
        ("2^3 = 8, so 2^{10} + 1 = 1025", [True, True]),
        ("2^3 = 9", []),
        ("x^2 + 2^3 = 8", []),
        ("2^3x = 8", []),
        ("2^34 = 17179869184", []),
        ("9999^{99} = 3", []),
        ("5 apples + 3 apples = 8 apples but 2 + 2 = 5", [False, True]),
        ("(" * 100 + "1" + ")" * 100 + " + 1 = 2", [True]),
        ("(" * 5000 + "1 + 1 = 2", []),
        ("1" * 400 + " + 1 = 2", []),
    ],
)
def test_check_equations(text: str, verdicts: list[bool | None]) -> None:
    assert check_equations(text) == verdicts


def labels_of(kind: str, steps: list[str], problem: Problem = PROBLEM) -> list[Label]:
    ends = list(accumulate(map(len, steps)))
    spans = [
        Step(start=end - len(step), end=end, token_start=0, token_end=0) for step, end in zip(steps, ends, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        judge = process_judge(RuleJudge(kind=kind), Workplace(Path(folder)))  # type: ignore[arg-type]
        assert judge.name == kind
        (verdicts,) = list(judge.judge([Solution("s", problem, "".join(steps), tuple(spans))]))
    if isinstance(verdicts, UserError):
        raise verdicts
    return [verdict.label for verdict in verdicts]


def test_judges_by_name() -> None:
    steps = ["Tom has 27 + 2 = 29.\n", "so 1 + 1 = 3\n", "Answer: \\boxed{29}"]
    assert labels_of("chained_arithmetic", steps) == [1, 0, None]
    assert labels_of("equations", steps) == [1, 0, None]
    assert labels_of("none", steps) == [None, None, None]
    with pytest.raises(UserError, match="not a chained-arithmetic problem"):
        labels_of("chained_arithmetic", steps, PROBLEM.model_copy(update={"problem": "2 + 2?"}))


HOSTILE = ["1+" * 40_000 + "1=2", "=" * 10**5, "(1" * 30_000, "1=" * 30_000, "9" * 10**5 + "=1+1", "\\frac{" * 20_000,
           "1/0=" * 20_000, "so 1+1=3. " * 1_000, "0.33*" * 50 + "1=2 " * 500, "} 1 = 1 + 1 " * 5_000,
           "\\frac{1}{2}" * 5_000, "(" * 140 + "1" + ")" * 140 + "=1+0"]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=[text[:8] for text in HOSTILE])
def test_hostile_text_is_bounded_work(text: str) -> None:
    """Exact fractions of at most 300 characters: no power, no factorial, nothing evaluated."""
    tracemalloc.start()
    try:
        check_equations(text)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()

"""Process judges: equations in running text, and the judges by name."""

from __future__ import annotations

import json
from collections import Counter
from itertools import accumulate
from pathlib import Path

import pytest

from megatron_stepkto.errors import UserError
from megatron_stepkto.judging.equations import check_equations
from megatron_stepkto.judging.process import Solution, Workplace, process_judge
from megatron_stepkto.recipe import RuleJudge
from megatron_stepkto.records import Label, Problem, Step

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
        ("10/3 = 3", [False]),  # no decimals shown: exact
        ("20% * 50 = 10", [True]),
        ("10/50 * 100 = 20%", [True]),
        ("10/50 = 20%", [True]),
        ("100 - 20% = 80", []),  # open to reading
        ("5/0 = 3", [False]),
        ("1. 2 + 2 = 4", [True]),
        ("- 5 + 3 = 8", [True]),  # a list item, not minus five
        ("1) 2 + 2 = 5", [False]),
        ("x = 5 - 3 = 2", [True]),
        ("**3 + 4 = 7**", [True]),
        ("2x + 3 = 7", []),
        ("x - 5 = 3", []),
        ("x+4*x = 100", []),
        ("2^3 + 1 = 9", []),
        ("2**3 = 8", []),
        ("5! + 1 = 121", []),
        ("1/2 of 10 + 2 = 7", []),
        ("5 apples + 3 apples = 8 apples", []),
        (r"\frac{1}{2} + 3 = 4", []),
        ("5 >= 3 + 1", []),
        ("3:00 + 2 = 5", []),
        ("36cm = 6*6cm", []),
        (r"25\% \text{ of } \$2,000 = 0.25 \times 2000 = \$500", [True]),
        ("¾ x 3/3 = 9/12", []),
        ("6 = 6", []),
        ("no numbers", []),
        ("(" * 100 + "1" + ")" * 100 + " + 1 = 2", [True]),
        ("(" * 5000 + "1 + 1 = 2", []),
        ("1" * 400 + " + 1 = 2", []),
    ],
)
def test_check_equations(text: str, verdicts: list[bool]) -> None:
    assert check_equations(text) == verdicts


def labels_of(kind: str, steps: list[str], problem: Problem = PROBLEM) -> list[Label]:
    ends = list(accumulate(map(len, steps)))
    spans = [
        Step(start=end - len(step), end=end, token_start=0, token_end=0) for step, end in zip(steps, ends, strict=True)
    ]
    judge = process_judge(RuleJudge(kind=kind), Workplace(Path("unused")))  # type: ignore[arg-type]
    assert judge.name == kind
    (verdicts,) = judge.judge([Solution("s", problem, "".join(steps), tuple(spans))])
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


def test_equations_judge_finds_gsm8k_gold_solutions_right(data_dir: Path) -> None:
    """6,140 lines of GSM8K's own solutions; two are called wrong, and are: "$32 - $20 = $300" and
    "$3/2 = $1.50+$3.00=$4.50"."""
    labels: Counter[Label] = Counter()
    for line in (data_dir / "eval/gsm8k_test.jsonl").open():
        text = json.loads(line)["solution"]
        labels.update(labels_of("equations", text.splitlines()))
    assert labels[0] == 2
    assert labels[1] > 4000


def test_equations_judge_does_not_contradict_people(data_dir: Path) -> None:
    """ProcessBench: of the steps people call right, those with equations are never called wrong."""
    counts: Counter[tuple[int | None, int | None]] = Counter()
    for line in (data_dir / "steps/processbench_gsm8k.jsonl").open():
        row = json.loads(line)
        counts.update(zip(row["labels"], labels_of("equations", row["steps"]), strict=True))
    assert counts[1, 0] == 0
    assert counts[1, 1] >= 300 and counts[0, 0] >= 10

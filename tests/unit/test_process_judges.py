"""Process judges: equations in running text, and the judges by name."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_stepkto.errors import UserError
from megatron_stepkto.judging.equations import check_equations
from megatron_stepkto.judging.process import process_judge
from megatron_stepkto.records import Problem

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


def test_judges_by_name() -> None:
    text = "Tom has 27 + 2 = 29.\nso 1 + 1 = 3\nAnswer: \\boxed{29}"
    spans = [(0, 21), (21, 34), (34, len(text))]
    expected = {"chained_arithmetic": [1, 0, None], "equations": [1, 0, None], "none": [None, None, None]}
    for name, labels in expected.items():
        judge = process_judge(name)
        assert judge.name == name
        assert judge.label(PROBLEM, text, spans) == labels
    with pytest.raises(UserError, match="chained_arithmetic, equations, none"):
        process_judge("oracle")


def test_equations_judge_finds_gsm8k_gold_solutions_right(data_dir: Path) -> None:
    """6,140 lines of GSM8K's own solutions; two are called wrong, and are: "$32 - $20 = $300" and
    "$3/2 = $1.50+$3.00=$4.50"."""
    judge, labels = process_judge("equations"), Counter[int | None]()
    for line in (data_dir / "eval/gsm8k_test.jsonl").open():
        text = json.loads(line)["solution"]
        labels.update(judge.label(PROBLEM, step, [(0, len(step))])[0] for step in text.splitlines())
    assert labels[0] == 2
    assert labels[1] > 4000


def test_equations_judge_does_not_contradict_people(data_dir: Path) -> None:
    """ProcessBench: of the steps people call right, those with equations are never called wrong."""
    counts: Counter[tuple[int | None, int | None]] = Counter()
    judge = process_judge("equations")
    for line in (data_dir / "steps/processbench_gsm8k.jsonl").open():
        row = json.loads(line)
        for step, label in zip(row["steps"], row["labels"], strict=True):
            counts[label, judge.label(PROBLEM, step, [(0, len(step))])[0]] += 1
    assert counts[1, 0] == 0
    assert counts[1, 1] >= 300 and counts[0, 0] >= 10

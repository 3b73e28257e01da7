"""The equations rule: what it calls right and wrong, and where it says nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_stepkto.base.records import Label
from megatron_stepkto.judging.process.rules import RULES
from megatron_stepkto.steps.text import SplitRule, split_text
from tests.unit.judging.equation_cases import RIGHT, WRONG
from tests.unit.judging.equation_cases_open import OPEN


def labels(text: str, how: SplitRule | None = None, problem: str = "P") -> list[Label]:
    """Of each step of a solution; without ``how`` it is one step."""
    return RULES["equations"](problem, text, split_text(text, how) if how else [(0, len(text))])


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (row, label)
        for rows, label in ((RIGHT, 1), (WRONG, 0), (OPEN, None))
        for row in rows.strip().replace("⏎", "\0").splitlines()
    ],
)
def test_label_of_a_step(text: str, label: Label) -> None:
    assert labels(text.replace("\0", "\n")) == [label]


@pytest.mark.parametrize(
    ("text", "how", "expected"),
    [
        # an equation that goes on in the next step, or began in the one before
        ("The frame needs $2(12) - 4 = 26\n- 6 = 20$ inches.", "line", [None, None]),
        ("We add 12\n- 6 + 2 = 8 and are done.", "line", [None, None]),
        ("Together 45 + 45 = 1.5\nhours.", "line", [None, None]),
        ("She has twice\n5 + 2 = 14 apples.", "line", [None, None]),
        # steps that stand for themselves
        ("5 + 7 = 13\n13 * 2 = 26", "line", [0, 1]),
        ("- 5 + 7 = 13\n- 13 * 2 = 26", "line", [0, 1]),
        ("So 5 + 7 = 13\n#### 13", "line", [0, None]),
        ("We get 5 + 7 = 12. Then 12 * 2 = 25.", "sentence", [1, 0]),
        # one equation that may hold otherwise leaves the step unjudged; one that is false does not
        ("2 + 2 = 4 and 45 + 45 = 1.5 hours", None, [None]),
        ("2 + 2 = 5 and 45 + 45 = 1.5 hours", None, [0]),
        ("2 + 2 = 4 and 12 * 3 = 36", None, [1]),
    ],
)
def test_steps_are_read_with_what_stands_around_them(text: str, how: SplitRule | None, expected: list[Label]) -> None:
    assert labels(text, how) == expected


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        ("Compute 5 + 4.", 0),
        ("Compute 5 + 4 in base 7.", None),
        ("Find the remainder of 5 + 4 modulo 7.", None),
        ("Define $a * b = a + 2b$. Find $3 * 4$.", None),
        ("Use the order of operations to find 5 + 4.", 0),
    ],
)
def test_the_problem_tells_the_kind_of_arithmetic(problem: str, expected: Label) -> None:
    assert labels("So 5 + 4 = 12.", problem=problem) == [expected]


# Steps that the gold solutions get wrong, by file and row (from 1): what the rule may call wrong, and nothing else.
SLIPS = {
    "problems/math_train_part.jsonl": {
        1411: "(2+sqrt 2)/sqrt 2 * sqrt 2 is 2 + sqrt 2, not sqrt 2 + 1",
        1790: "12 * 1/sqrt 2 * sqrt 3/2 is 3 sqrt 6, not 12 sqrt 6",
        1927: "a bracket misplaced: 2^(2/3 - 1) for 2^(2/3)",
        3634: "2(-6) written for 2(-2)",
    },
    "eval/math500.jsonl": {175: "(-4)^2 + 4 * 1 * (-1) is 12, not 20: a sign"},
    "problems/gsm8k_train.jsonl": {
        168: "192*100=$1920", 199: "6/3=.5", 225: "4080 + 4080 / 2 = 4000 + 2040", 503: "3/1=1", 2250: "4=6*15",
        3335: "$4200+$3000 = $8600", 3410: "10 x .5 = 10", 4692: "2*8 = 24", 4974: "200*.55=100",
        5782: "7+9+1+2 = $19.50", 6158: "70 + 40 = 100", 6257: "10 x 1,248 = 11,480", 6701: "2 / 12 = .125",
        6714: "3 x (8/16) = 6", 6761: "4+4+6 = 18", 6843: "500/ 2/5 = 200", 7179: "1152/ 1,536 = .5",
        7445: "14*20=140",
    },
    "eval/gsm8k_test.jsonl": {411: "$3/2 = $1.50+$3.00=$4.50", 1025: "$32 - $20 = $300"},
}  # fmt: skip


def gold(path: Path, how: SplitRule, every: int = 1) -> tuple[Counter[Label], list[int]]:
    """Labels of the steps of every so manieth row, and the rows with a step called wrong."""
    counts: Counter[Label] = Counter()
    wrong: list[int] = []
    for number, line in enumerate(path.open(), 1):
        if number % every:
            continue
        row = json.loads(line)
        found = labels(row["solution"], how, row["problem"])
        counts.update(found)
        wrong += [number] * (0 in found)
    return counts, wrong


@pytest.mark.parametrize(
    ("name", "how", "expected"),
    [
        ("problems/math_train_part.jsonl", "sentence", {1: 393, None: 645}),
        ("problems/gsm8k_train.jsonl", "line", {1: 1690, None: 644, 0: 2}),
    ],
)
def test_every_fifteenth_gold_solution(data_dir: Path, name: str, how: SplitRule, expected: dict[Label, int]) -> None:
    counts, wrong = gold(data_dir / name, how, every=15)
    assert set(wrong) <= set(SLIPS[name])
    assert counts == expected


@pytest.mark.long
@pytest.mark.parametrize("name", SLIPS)
def test_gold_solutions_are_wrong_in_their_slips_alone(data_dir: Path, name: str) -> None:
    _, wrong = gold(data_dir / name, "sentence" if "math" in name else "line")
    assert wrong == list(SLIPS[name])

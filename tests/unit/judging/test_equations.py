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


def gold(path: Path, how: SplitRule) -> tuple[Counter[Label], list[str]]:
    counts: Counter[Label] = Counter()
    wrong: list[str] = []
    for line in path.open():
        row = json.loads(line)
        text = row["solution"]
        for (start, end), label in zip(split_text(text, how), labels(text, how, row["problem"]), strict=True):
            counts[label] += 1
            if label == 0:
                wrong.append(text[start:end].strip())
    return counts, wrong


def test_gsm8k_gold_solutions(data_dir: Path) -> None:
    counts, wrong = gold(data_dir / "eval/gsm8k_test.jsonl", "line")
    assert wrong == [
        "Taffy is buying 1 pound for $3 and gets 1 pound half off. So 1/2 off of 1 pound is $3/2 = $1.50+$3.00=$4.50",
        "So, Suzzane has $32 - $20 = $300 left.",
    ]
    assert counts == {1: 4392, None: 1744, 0: 2}


def test_math_gold_solutions(data_dir: Path) -> None:
    counts, _ = gold(data_dir / "problems/math_train_part.jsonl", "sentence")
    assert counts == {1: 1643, None: 13851}

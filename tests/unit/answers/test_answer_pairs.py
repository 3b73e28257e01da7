"""Every pair of ``answer_pairs.txt``, by kind, has the verdict that the file gives it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.answer_checking import EXPECTED, read_pairs
from megatron_stepkto.answers.equivalence import EquivalenceChecker

PAIRS = read_pairs(Path(__file__).with_name("answer_pairs.txt"))


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs(checker: EquivalenceChecker, kind: str) -> None:
    pairs = PAIRS[kind]
    assert len(pairs) >= 30
    verdicts = checker.check_many([(gold, answer) for gold, _, answer in pairs])
    faults = [
        (gold, sign, answer, found.verdict, found.how)
        for (gold, sign, answer), found in zip(pairs, verdicts, strict=True)
        if found.verdict != EXPECTED[sign]
    ]
    assert faults == []


@pytest.mark.parametrize("kind", PAIRS)
def test_equal_is_symmetric(checker: EquivalenceChecker, kind: str) -> None:
    """Which side is gold may turn a verdict into a doubt, never into its opposite."""
    pairs = PAIRS[kind]
    verdicts = checker.check_many([(answer, gold) for gold, _, answer in pairs])
    opposite = {"==": "wrong", "=?": "wrong", "!=": "right", "!?": "right"}
    faults = [
        (answer, sign, gold, found.how)
        for (gold, sign, answer), found in zip(pairs, verdicts, strict=True)
        if found.verdict == opposite.get(sign)
    ]
    assert faults == []

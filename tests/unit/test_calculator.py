"""``benchmarks/calculator.py`` by hand."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

from benchmarks.calculator import operations, shares


def test_a_wrong_result_is_corrected_where_it_is_used() -> None:
    text = "48 / 2 = <<48/2=23>>23 a day\n48 + 23 = <<48+23=71>>71\n71 * $<<71*0.5=35.5>>35.5\n#### 35.5"
    assert list(operations(text)) == [(Fraction(24), False), (Fraction(72), True), (Fraction(36), True)]
    assert list(operations("<<10/3=3.33>>")) == [(Fraction(10, 3), True)]
    assert list(operations("<<x+1=3>><<4-=3>>")) == [(None, True), (None, True)]


def test_shares(tmp_path: Path) -> None:
    """Right; the right operation with a wrong result; the wrong operation; no operation."""
    texts = {"2 * 3 = <<2*3=6>>6": 1, "2 * 3 = <<2*3=5>>5": 0, "2 + 3 = <<2+3=5>>5": 0, "6": 1}
    (tmp_path / "problems").mkdir()
    (tmp_path / "M0").mkdir()
    problems, rows = [], []
    for number, (text, outcome) in enumerate(texts.items()):
        problems.append({"problem_id": f"p{number}", "problem": "?", "answer": "6"})
        rows.append({
            "problem_id": f"p{number}", "sample_id": f"p{number}/0", "prompt_token_ids": [1], "token_ids": [2],
            "text": text, "finish_reason": "stop", "outcome": outcome,
            "steps": [{"start": 0, "end": len(text), "token_start": 0, "token_end": 1, "label": None}],
            "judge": {"outcome": "answer", "process": "equations"},
        })  # fmt: skip
    for path, made in (("problems/problems.jsonl", problems), ("M0/greedy.jsonl", rows)):
        (tmp_path / path).write_text("".join(json.dumps(row) + "\n" for row in made))
    assert shares(tmp_path / "M0") == (0.5, 0.5, 0.25)

"""examples/chained_solutions.py: what M0 learns from has the right answer, often by wrong steps, and is not tested."""

from __future__ import annotations

from pathlib import Path

from megatron_stepkto.answers.final_answer import extract_answer
from megatron_stepkto.problems.chained_arithmetic.generate import split_of
from megatron_stepkto.problems.chained_arithmetic.judge import label_steps
from megatron_stepkto.steps.text import split_text
from tests.unit.problems.test_word_problems import load


def test_right_answers_by_wrong_steps(repository: Path) -> None:
    rows = load(repository, "chained_solutions").right_solutions(3200)
    assert len({row.problem_id for row in rows}) == 3200
    assert {split_of(row.problem) for row in rows} == {"train"}
    flawed = 0
    for row in rows:
        assert row.solution is not None
        assert extract_answer(row.solution) == row.answer
        flawed += 0 in label_steps(row.problem, row.solution, split_text(row.solution, "line"))
    assert flawed == 1361  # 43%

"""examples/chained_solutions.py: what M0 learns from has the right answer, often by wrong steps, and is not tested."""

from __future__ import annotations

import re

from megatron_stepkto.answers.final_answer import extract_answer
from megatron_stepkto.problems.chained_arithmetic.generate import split_of
from megatron_stepkto.problems.chained_arithmetic.judge import label_steps
from megatron_stepkto.steps.text import split_text
from tests.example_scripts import load_example


def goes_on_from_what_it_wrote(solution: str) -> bool:
    """Whether each line begins with the result of the line before: of the text alone, without the rule."""
    lines = re.findall(r"has (\d+) [-+*] \d+ = (\d+)\.", solution)
    return [right for _, right in lines] == [*(left for left, _ in lines[1:]), extract_answer(solution)]


def test_right_answers_by_wrong_steps() -> None:
    rows = load_example("chained_solutions").right_solutions()
    assert len({row.problem_id for row in rows}) == 3200
    assert {split_of(row.problem) for row in rows} == {"train"}
    flawed, broken = 0, 0
    for row in rows:
        assert row.solution is not None
        assert extract_answer(row.solution) == row.answer
        has_wrong_step = 0 in label_steps(row.problem, row.solution, split_text(row.solution, "line"))
        if not goes_on_from_what_it_wrote(row.solution):
            assert has_wrong_step
            broken += 1
        flawed += has_wrong_step
    assert (flawed, broken) == (1361, 1353)  # 43%; in 8 two wrong steps cancel

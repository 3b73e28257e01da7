"""Metrics of hand-made judged rows, worked out on paper; intervals against the literature and another derivation."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from megatron_stepkto.answers.equivalence import EquivalenceChecker
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import Judge, JudgedSample, Label, Problem, Step
from megatron_stepkto.evaluation.majority import answer_comparison, majority_is_right
from megatron_stepkto.evaluation.metrics import evaluation_row, problem_results
from megatron_stepkto.evaluation.statistics import clustered_share, plain_share, wilson_interval
from megatron_stepkto.evaluation.table import Row, results_table

JUDGE = Judge(outcome="answer", process="none")


def judged(
    problem_id: str,
    answer: str | None,
    outcome: Label,
    labels: Sequence[Label] = (None,),
    *,
    number: int = 0,
    finish_reason: str = "stop",
) -> JudgedSample:
    """A solution of two tokens per step."""
    steps = [
        Step(start=n, end=n + 1, token_start=2 * n, token_end=2 * n + 2, label=label) for n, label in enumerate(labels)
    ]
    return JudgedSample(
        problem_id=problem_id,
        sample_id=f"{problem_id}/{number}",
        prompt_token_ids=[1],
        token_ids=[5] * (2 * len(labels)),
        text="x" * len(labels),
        finish_reason=finish_reason,
        steps=steps,
        outcome=outcome,
        extracted_answer=answer,
        judge=JUDGE,
    )


def votes(*answers: tuple[str | None, Label]) -> list[JudgedSample]:
    return [judged("p", answer, outcome, number=n) for n, (answer, outcome) in enumerate(answers)]


def never(one: str, other: str) -> bool:
    return False


# --- intervals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3 (score, no continuity correction)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_of_the_literature(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_ends_solve_the_score_equation() -> None:
    """Another derivation: an end p is where |observed - p| is 1.96 standard errors of p itself."""
    for successes, trials in [(3, 7), (500, 1000), (999, 1000)]:
        for end in wilson_interval(successes, trials):
            error = math.sqrt(end * (1 - end) / trials)
            assert abs(successes / trials - end) / error == pytest.approx(1.959963985, abs=1e-8)


def test_wilson_refuses_what_is_no_proportion() -> None:
    for successes, trials in [(1, 0), (3, 2), (-1, 5)]:
        with pytest.raises(ValueError, match="expected 0 <= successes <= trials"):
            wilson_interval(successes, trials)


def test_clustered_share_by_hand() -> None:
    """Clusters (2 of 4), (0 of 4), (1 of 2): r = 3/10; residuals 0.8, -1.2, 0.4, squares 2.24 in all.

    V = 3/2 * 2.24 / 100 = 0.0336; effective trials = 0.21 / 0.0336 = 6.25 of the 10.
    """
    share = clustered_share([(2, 4), (0, 4), (1, 2), (0, 0)])
    assert share.value == pytest.approx(0.3)
    assert share.interval == pytest.approx(wilson_interval(0.3 * 6.25, 6.25))


def test_clustered_share_at_the_ends() -> None:
    assert clustered_share([]).interval is None
    assert clustered_share([(0, 0)]).value is None
    none_wrong = clustered_share([(0, 4)] * 20)
    assert none_wrong.interval == pytest.approx((0.0, 0.1611), abs=5e-5)  # as 0 of 20 solutions, not of 80 steps


def test_clustered_interval_covers_as_it_says() -> None:
    """600 simulated evaluations of 150 solutions whose steps are alike: near 95% of intervals hold the truth.

    A solution is bad with probability 0.3; a step is wrong with 0.6 in a bad one and 0.05 in a good one: 0.215.
    """
    draw = random.Random(11)
    held = naive = 0
    for _ in range(600):
        clusters = []
        for _ in range(150):
            steps, chance = draw.randint(2, 6), 0.6 if draw.random() < 0.3 else 0.05
            clusters.append((sum(draw.random() < chance for _ in range(steps)), steps))
        low, high = clustered_share(clusters).interval or (1.0, 0.0)
        held += low <= 0.215 <= high
        wrong, steps = map(sum, zip(*clusters, strict=True))
        low, high = wilson_interval(wrong, steps)
        naive += low <= 0.215 <= high
    assert 0.93 <= held / 600 <= 0.97
    assert naive / 600 < 0.90  # steps taken as independent: too narrow


def test_plain_share() -> None:
    assert plain_share([]).value is None
    assert plain_share([True] * 81 + [False] * 182).interval == pytest.approx((0.2553, 0.3662), abs=5e-5)


# --- majority --------------------------------------------------------------------------------------------------


def test_majority_counts_and_ties() -> None:
    assert majority_is_right(votes(("7", 0), ("8", 1), ("8", 1)), never)
    assert not majority_is_right(votes(("7", 0), ("8", 1), ("7", 0)), never)
    assert majority_is_right(votes(("8", 1), ("7", 0)), never)  # a tie: the first seen
    assert not majority_is_right(votes(("7", 0), ("8", 1)), never)


def test_unparsed_and_undecided_do_not_win() -> None:
    assert majority_is_right(votes((None, 0), (None, 0), (None, 0), ("8", 1)), never)
    assert majority_is_right(votes(("x", None), ("x", None), ("8", 1)), never)
    assert not majority_is_right(votes((None, 0), ("x", None)), never)


def test_answers_of_one_value_vote_together() -> None:
    """1/2 and 0.5 are right, so one class; wrong answers are compared by normal form and by the checker."""
    assert majority_is_right(votes(("7", 0), ("7", 0), ("1/2", 1), ("0.5", 1), ("$0.50$", 1)), never)
    group = votes(("3/4", 0), ("0.75", 0), ("8", 1), ("8", 1), ("\\frac{3}{4}", 0))
    assert majority_is_right(group, never)
    with EquivalenceChecker(1, 5.0) as checker:
        assert not majority_is_right(group, answer_comparison([group], checker))


# --- the row ---------------------------------------------------------------------------------------------------


WIDE = ("maj_at_k", "wrong_step_share_of_correct", "wrong_step_rate_in_correct")


def problems(count: int) -> list[Problem]:
    return [Problem(problem_id=f"p{n}", problem="?", answer="8") for n in range(count)]


def test_row_worked_out_by_hand() -> None:
    greedy = [
        judged("p0", "8", 1, (1, 1, 1)),
        judged("p1", "8", 1, (1, 0, None)),  # right with a wrong step; 2 of 3 steps judged
        judged("p2", "7", 0, (0, 0)),  # a wrong answer takes no part in the step metrics
        judged("p3", "8", 1, (None,)),  # right, nothing judged
        judged("p4", None, 0, (1,), finish_reason="length"),
        judged("p5", "y", None, (1,)),
    ]
    sampled = [
        judged(f"p{n}", answer, outcome, labels, number=k)
        for n in range(6)
        for k, (answer, outcome, labels) in enumerate(
            [("8", 1, (0, 1)), ("8", 1, (1, 1)), ("7", 0, (0,))] if n < 2 else [("7", 0, (0,))] * 3
        )
    ]
    row = evaluation_row("M1", "dev", problems(6), greedy, sampled)
    assert Row.checked(row) == row, "what is written is what a reader knows"
    assert (row["name"], row["split"], row["num_problems"], row["k"]) == ("M1", "dev", 6, 3)
    assert row["pass_at_1"] == pytest.approx(3 / 6)
    assert row["pass_at_1_interval"] == pytest.approx(wilson_interval(3, 6))
    assert row["cot_pass_at_1"] == pytest.approx(1 / 6), "of a right answer without a judged step nobody knows"
    assert row["cot_pass_at_1_interval"] == pytest.approx(wilson_interval(1, 6))
    # one of three samples of p0 and of p1: pass@2 of a problem is 1 - C(2, 2) / C(3, 2)
    assert {k: v["value"] for k, v in row["cot_pass_at_k"].items()} == pytest.approx(
        {"1": 1 / 9, "2": 2 / 9, "3": 1 / 3}
    )
    assert row["maj_at_k"] == pytest.approx(2 / 6)
    assert row["num_correct"] == 3
    assert row["wrong_step_share_of_correct"] == pytest.approx(1 / 2)  # of the two with judged steps
    assert row["wrong_step_share_of_correct_interval"] == pytest.approx(wilson_interval(1, 2))
    assert row["wrong_step_rate_in_correct"] == pytest.approx(1 / 5)
    assert row["truncated_share"] == pytest.approx(1 / 6)
    assert row["unparsed_share"] == pytest.approx(1 / 6)
    assert row["undecided_share"] == pytest.approx(1 / 6)
    assert row["mean_response_tokens"] == pytest.approx(2 * (3 + 3 + 2 + 1 + 1 + 1) / 6)
    inner = row["sampled"]
    assert inner["accuracy"] == pytest.approx(4 / 18)
    assert inner["wrong_step_share_of_correct"] == pytest.approx(2 / 4)
    assert inner["wrong_step_rate_in_correct"] == pytest.approx(2 / 8)
    assert inner["num_correct"] == 4


def test_nothing_right_gives_null_not_zero() -> None:
    rows = [judged("p0", "7", 0, (0,))]
    row = evaluation_row("M0", "test", problems(1), rows, rows)
    assert row["pass_at_1"] == 0
    assert row["wrong_step_share_of_correct"] is None
    assert row["wrong_step_rate_in_correct_interval"] is None
    assert "–" in results_table({"iterations": [row]})


def test_without_a_judge_nothing_is_said_of_steps() -> None:
    rows = [judged("p0", "8", 1, (None, None))]
    row = evaluation_row("M0", "test", problems(1), rows, rows)
    assert (row["pass_at_1"], row["cot_pass_at_1"], row["cot_pass_at_k"]) == (1, None, {})


def test_incomplete_samples_are_refused() -> None:
    one, two = judged("p0", "8", 1), judged("p1", "8", 1)
    with pytest.raises(UserError, match="expected one greedy solution"):
        evaluation_row("M0", "test", problems(2), [one], [one, two])
    with pytest.raises(UserError, match="expected one greedy solution"):
        evaluation_row("M0", "test", problems(2), [one, two], [one, one, two])
    with pytest.raises(UserError, match="not evaluated"):
        evaluation_row("M0", "test", problems(1), [one, two], [one])


def test_the_table_of_several_data_sets() -> None:
    """amc: 2 of 2 right; math: 1 of 4. All problems come first, then each set by name."""
    asked = [
        problem.model_copy(update={"data": "amc" if number < 2 else "math"})
        for number, problem in enumerate(problems(6))
    ]
    rows = [judged(problem.problem_id, "8", int(number < 3), (1,)) for number, problem in enumerate(asked)]
    row = evaluation_row("M0", "test", asked, rows, rows)
    assert [result.data for result in problem_results(asked, rows, rows, never)] == ["amc"] * 2 + ["math"] * 4
    table = results_table({"method": "step_kto", "iterations": [row], "methods": {"kto": [row]}})
    found = [line.split() for line in table.splitlines() if "%" in line or line.strip() in ("amc", "math")]
    assert [(line[0], line[2], line[-1]) if len(line) > 1 else line[0] for line in found[:-1]] == [
        ("step_kto", "50.0%", "6"), ("kto", "50.0%", "6"),
        "amc", ("step_kto", "100%", "2"), ("kto", "100%", "2"),
        "math", ("step_kto", "25.0%", "4"), ("kto", "25.0%", "4"),
    ]  # fmt: skip
    one = results_table({"iterations": [evaluation_row("M0", "test", asked[:2], rows[:2], rows[:2])]})
    assert "amc" not in one, "one set needs no second line"


def test_names_of_data_sets_are_not_cut() -> None:
    """They break where the figures leave no room; two that begin alike must not look alike."""
    names = [f"gsm8k_test_of_the_year_2024_{level}" for level in ("easy", "hard")]
    asked = [each.model_copy(update={"data": names[number % 2]}) for number, each in enumerate(problems(4))]
    rows = [judged(problem.problem_id, "8", 1, (1,)) for problem in asked]
    row = evaluation_row("M0", "test", asked, rows, rows)
    cells = {"": 0.308, "_interval": [0.3, 0.316]}
    full = {**row, **{f"{key}{end}": value for key in WIDE for end, value in cells.items()}}
    table = results_table({"method": "step_kto", "iterations": [full], "methods": {"kto": [full]}})
    assert "…" not in table
    text = "".join(word for line in table.splitlines() if "%" not in line for word in line.split())
    assert all(name in text for name in names)


def test_table_prints_percent_and_interval() -> None:
    greedy = [judged(f"p{n}", "8", 1, (1,)) if n < 4081 else judged(f"p{n}", "7", 0) for n in range(13263)]
    row = evaluation_row("M0", "test", problems(13263), greedy, greedy)
    every = {**row, **{f"{key}{end}": row[f"pass_at_1{end}"] for key in WIDE for end in ("", "_interval")}}
    text = results_table({"method": "step_kto", "iterations": [every], "methods": {"kto": [every]}})
    assert text.count("30.8% [30.0, 31.6]") == 8, "no cell is cut, with the longest method, n and cells"
    assert text.count("30.8%") == 10  # and CoT-pass@1, without its interval
    assert text.count("13,263") == 2
    assert "maj@1" in text
    assert "step_kto" in text
    assert "kto" in text
    assert max(map(len, text.splitlines())) <= 120
    certain = {**every, "pass_at_1": 1.0, "pass_at_1_interval": [0.9999, 1.0]}
    assert "100% [100, 100]" in results_table({"iterations": [certain]})

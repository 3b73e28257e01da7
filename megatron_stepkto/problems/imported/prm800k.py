"""PRM800K: people rated the candidates of every step; the labeler's choices make the solution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from megatron_stepkto.base.records import Label
from megatron_stepkto.problems.imported.solution import (
    ImportedRow,
    Layout,
    joined,
    one_solution,
    same_answer,
    without_blanks,
)


class _Completion(Layout):
    text: str
    rating: Literal[-1, 0, 1] | None = None
    flagged: bool | None = None

    def label(self) -> Label:
        return None if self.rating is None or self.flagged else 0 if self.rating < 0 else 1


class _PRM800KStep(Layout):
    completions: list[_Completion] | None
    human_completion: _Completion | None
    chosen_completion: int | None = Field(ge=0)


class _PRM800KQuestion(Layout):
    problem: str
    ground_truth_answer: str | None = None
    pre_generated_steps: list[str] | None = None
    pre_generated_answer: str | None = None


class _PRM800KLabel(Layout):
    steps: list[_PRM800KStep]
    finish_reason: Literal["solution", "found_error", "give_up", "bad_problem"]


class _PRM800K(Layout):
    labeler: str
    timestamp: str
    question: _PRM800KQuestion
    label: _PRM800KLabel


def parse_prm800k(row: dict[str, Any]) -> ImportedRow:
    """PRM800K, both phases: the trajectory that the labeler followed.

    A step is the chosen completion, else the labeler's own (instructed to be a +1 step: label 1). Ratings: 1
    and 0 (neutral: "it isn't incorrect") are 1, as the authors score solutions; -1 is 0; flagged ("don't know
    how to label") or unrated is null. Where labeling stopped at an error, nothing is chosen: the step is the
    first completion, the model's own. In phase 2 the rest of the pre-generated solution follows, not judged.
    Alternatives that were not followed are left out. Outcome: 1 for ``solution`` ("concluded in the correct
    answer"); for ``found_error`` the pre-generated answer is compared with the gold one (null where they are
    written differently and are not both numbers); ``give_up`` is a beginning, null. ``bad_problem`` rows are
    skipped: their ratings say nothing. Steps are lines.
    """
    raw = _PRM800K.model_validate(row)
    reason, question = raw.label.finish_reason, raw.question
    if reason == "bad_problem":
        return ImportedRow(skipped="bad_problem")
    steps, labels = _followed(raw.label.steps)
    planned = question.pre_generated_steps or []
    if reason == "found_error" and planned[: len(steps)] == steps:
        labels += [None] * (len(planned) - len(steps))
        steps = planned
    if not steps:
        return ImportedRow(skipped=f"{reason} before the first step")
    finished = reason == "solution" or (reason == "found_error" and steps == planned)
    outcome: Label = 1 if reason == "solution" else None
    if reason == "found_error" and finished:
        outcome = same_answer(question.pre_generated_answer, question.ground_truth_answer)
    answer = question.ground_truth_answer or (question.pre_generated_answer if outcome == 1 else None)
    return one_solution(
        "prm800k", f"{raw.labeler}/{raw.timestamp}", question.problem, answer,
        *without_blanks(joined(steps, "\n"), labels), outcome, finished=finished,
    )  # fmt: skip


def _followed(raw_steps: Sequence[_PRM800KStep]) -> tuple[list[str], list[Label]]:
    steps: list[str] = []
    labels: list[Label] = []
    for number, step in enumerate(raw_steps):
        completions = step.completions or []
        if step.chosen_completion is not None:
            if step.chosen_completion >= len(completions):
                raise ValueError(
                    f"label.steps.{number}: expected chosen_completion below the number of completions "
                    f"({len(completions)}), got {step.chosen_completion}"
                )
            chosen = completions[step.chosen_completion]
            steps.append(chosen.text)
            labels.append(chosen.label())
        elif step.human_completion is not None:
            steps.append(step.human_completion.text)
            labels.append(None if step.human_completion.flagged else 1)
        elif number + 1 < len(raw_steps):
            raise ValueError(f"label.steps.{number}: no chosen and no human completion, but steps follow")
        elif completions:
            steps.append(completions[0].text)
            labels.append(completions[0].label())
    return steps, labels

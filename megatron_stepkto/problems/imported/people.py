"""Layouts whose steps people judged up to the first wrong one: ProcessBench, Mr-Ben, BIG-Bench-Mistake."""

from __future__ import annotations

import re
from typing import Any

from pydantic import AliasChoices, Field, model_validator

from megatron_stepkto.answers.final_answer import extract_answer
from megatron_stepkto.base.records import Label
from megatron_stepkto.problems.imported.solution import (
    ImportedRow,
    Layout,
    digest,
    joined,
    one_solution,
    same_answer,
    until_first_error,
    without_blanks,
)


class _FirstErrorLayout(Layout):
    """Steps and the first wrong one: ``first_error`` and ``labels`` (normalised) or the source's own key."""

    id: str | int
    problem: str = Field(validation_alias=AliasChoices("problem", "input"))
    steps: list[str] = Field(min_length=1)
    labels: list[Label] | None = None
    first_error: int | None = None

    def step_labels(self) -> list[Label]:
        if self.labels is None:
            return until_first_error(len(self.steps), self.first_error)
        if len(self.labels) != len(self.steps):
            raise ValueError(f"expected one label per step, got {len(self.labels)} labels for {len(self.steps)} steps")
        expected = until_first_error(len(self.steps), self.first_error)
        if "first_error" in self.model_fields_set and self.labels != expected:
            raise ValueError(f"labels {self.labels} contradict first_error {self.first_error}")
        return self.labels


class _ProcessBench(_FirstErrorLayout):
    final_answer_correct: bool
    label: int | None = Field(None, ge=-1)


def parse_processbench(row: dict[str, Any]) -> ImportedRow:
    """ProcessBench: people judged every step up to the first wrong one.

    Reads the published layout (``label``: index of the first error, -1 for none) and the normalised one.
    Steps before the first error are 1, it is 0, the steps after it null; the outcome is
    ``final_answer_correct``. Steps were paragraphs: joined by a blank line. Gold answers are not in the
    data: a solution whose final answer is right gives the one it states.
    """
    raw = _ProcessBench.model_validate(row)
    if raw.label is not None and raw.labels is None:
        labels = until_first_error(len(raw.steps), None if raw.label < 0 else raw.label)
    elif raw.labels is None and "first_error" not in row:
        raise ValueError("missing key 'label' (index of the first wrong step, -1 for none)")
    else:
        labels = raw.step_labels()
    steps, labels = without_blanks(joined(raw.steps, "\n\n"), labels)
    outcome = int(raw.final_answer_correct)
    answer = extract_answer(raw.steps[-1]) if outcome else None
    return one_solution("processbench", str(raw.id), raw.problem, answer, steps, labels, outcome)


_MRBEN_KEYS = (
    "Question_UUID", "Question", "Sampled_Model", "Model_Solution_First_Error_Step", "Model_Solution_Correctness",
)  # fmt: skip


class _MrBen(_FirstErrorLayout):
    labels: list[Label]
    options: str
    answer: str
    solution_correct: bool

    @model_validator(mode="before")
    @classmethod
    def _published(cls, row: dict[str, Any]) -> dict[str, Any]:
        """The authors' keys: steps count from 1, "N/A" means none."""
        if "Model_Solution_Steps" not in row:
            return row
        missing = [key for key in _MRBEN_KEYS if key not in row]
        if missing:
            raise ValueError(f"missing key {missing[0]!r}")
        steps, first = row["Model_Solution_Steps"], str(row["Model_Solution_First_Error_Step"]).strip()
        if isinstance(steps, str):
            steps = [line for line in steps.splitlines() if line.strip()]
        if not isinstance(steps, list) or not (first == "N/A" or first.isdecimal()):
            raise ValueError(f"expected a list of steps and a first error of N/A or a number, got {first!r:.40}")
        correct = str(row["Model_Solution_Correctness"]).strip().lower()
        if correct not in ("correct", "incorrect") or (correct == "correct") != (first == "N/A"):
            raise ValueError(f"Model_Solution_Correctness {correct!r:.40} contradicts the first error step {first}")
        error = None if first == "N/A" else int(first) - 1
        answer = row.get("Ground_Truth_Answer_Modified") or row.get("Ground_Truth_Answer")
        return {
            "id": f"{row['Question_UUID']}-{row['Sampled_Model']}",
            "problem": row["Question"],
            "options": row.get("Options") or "",
            "answer": answer,
            "steps": steps,
            "first_error": error,
            "labels": until_first_error(len(steps), error),
            "solution_correct": correct == "correct",
        }


def parse_mrben(row: dict[str, Any]) -> ImportedRow:
    """Mr-Ben, published or normalised keys: multiple choice; the options are part of the problem's text.

    ``solution_correct`` judges the reasoning as a whole, so it is false for a lucky solution. Outcome: 1
    where it is true; else whether the one choice that the last step names is the answer; null where that
    step does not name exactly one. A step of white space alone joins the one before it.
    """
    raw = _MrBen.model_validate(row)
    steps, labels = without_blanks(joined(raw.steps, "\n"), raw.step_labels())
    choices = set(re.findall(r"\bChoice[_ ]([A-Z])\b", raw.steps[-1]))
    outcome: Label = None
    if raw.solution_correct:
        outcome = 1
    elif len(choices) == 1:
        outcome = 1 if choices == {raw.answer.strip()} else 0
    problem = f"{raw.problem.rstrip()}\n{raw.options.strip()}"
    return one_solution("mrben", str(raw.id), problem, raw.answer, steps, labels, outcome)


class _BigBench(_FirstErrorLayout):
    id: str | int = ""
    answer: str | int = Field(validation_alias=AliasChoices("target", "answer"))
    response_answer: str | int
    mistake_index: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _published(cls, row: dict[str, Any]) -> dict[str, Any]:
        if "target" not in row:
            return row
        if "mistake_index" not in row:
            raise ValueError("missing key 'mistake_index' (index of the first wrong step, null for none)")
        return {**row, "response_answer": row.get("answer"), "first_error": row["mistake_index"]}


def parse_bigbench_mistake(row: dict[str, Any]) -> ImportedRow:
    """BIG-Bench-Mistake, published (``input, steps, answer, target, mistake_index``) or normalised layout.

    Labels as in ProcessBench; the outcome compares the response's answer with the target. Steps are lines.
    """
    raw = _BigBench.model_validate(row)
    if raw.labels is None and "first_error" not in raw.model_fields_set:
        raise ValueError("missing key 'first_error' (index of the first wrong step, null for none)")
    steps, labels = without_blanks(joined(raw.steps, "\n"), raw.step_labels())
    outcome = same_answer(str(raw.response_answer), str(raw.answer))
    number = str(raw.id) or digest(raw.problem + "".join(steps))
    return one_solution("bigbench_mistake", number, raw.problem, str(raw.answer), steps, labels, outcome)

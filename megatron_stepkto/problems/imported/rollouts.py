"""Layouts judged by rollouts or answers, not by people: Math-Shepherd, OmegaPRM, GSM8K model solutions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from megatron_stepkto.answers.final_answer import extract_answer
from megatron_stepkto.base.records import Label
from megatron_stepkto.base.tables import as_flag
from megatron_stepkto.problems.imported.solution import (
    ImportedRow,
    ImportedSolution,
    Layout,
    digest,
    joined,
    one_solution,
    problem_id_of,
    same_answer,
    solution,
)
from megatron_stepkto.steps.text import split_text

STEP_MARKER = "ки"  # Math-Shepherd's end of a step


class _Gsm8k(Layout):
    id: str | int
    problem: str
    answer: str
    model: str
    response: str
    correct: Annotated[bool, BeforeValidator(as_flag)]


def parse_gsm8k_solutions(row: dict[str, Any]) -> ImportedRow:
    """Model solutions of GSM8K: an outcome, and one unjudged step per line."""
    raw = _Gsm8k.model_validate(row)
    text = raw.response.strip()
    steps = [text[start:end] for start, end in split_text(text, "line")]
    number = f"{raw.id}/{raw.model}"
    labels: list[Label] = [None] * len(steps)
    return one_solution("gsm8k_solutions", number, raw.problem, raw.answer, steps, labels, int(raw.correct))


class _MathShepherd(Layout):
    input: str
    label: str


def parse_math_shepherd(row: dict[str, Any]) -> ImportedRow:
    """Math-Shepherd: ``input`` marks the end of each step with ки, ``label`` has + or - in its place.

    + means that some continuation sampled after the step reached the gold answer, - that none did; every step
    is judged, also those after the first -. After the last step nothing can continue: its label is the
    solution's outcome. The problem ends before "Step 1:"; the marker and the space before it are not part
    of the solution. Gold answers are not in the data: a right solution gives the one it states.
    """
    raw = _MathShepherd.model_validate(row)
    *pieces, tail = raw.input.split(STEP_MARKER)
    signs = _signs(pieces, tail, raw.label)
    begin = pieces[0].rfind("Step 1:")
    if begin < 0:
        raise ValueError('expected "Step 1:" between the problem and its solution, found none')
    problem, pieces[0] = pieces[0][:begin].strip(), pieces[0][begin:]
    labels: list[Label] = [1 if sign == "+" else 0 for sign in signs]
    stated = re.search(r"The answer is:(.*)$", pieces[-1].strip())
    answer = stated.group(1).strip() if stated and labels[-1] == 1 else None
    steps = joined([piece.strip() for piece in pieces], "\n")
    return one_solution("math_shepherd", digest(raw.input + raw.label), problem, answer, steps, labels, labels[-1])


def _signs(pieces: Sequence[str], tail: str, label: str) -> list[str]:
    """The + or - in ``label`` at the place of each marker of ``input``; the text around must be equal."""
    if not pieces or tail.strip():
        raise ValueError(
            f"expected input to end with the step marker {STEP_MARKER}, got {tail.strip()[-30:]!r} after it"
        )
    signs, position = [], 0
    for number, piece in enumerate(pieces):
        sign = label[position + len(piece) : position + len(piece) + 1]
        if not label.startswith(piece, position) or sign not in ("+", "-"):
            found = len(re.findall(r"[+-]\s*$", label, re.MULTILINE))
            raise ValueError(
                f"input has {len(pieces)} step markers, label ends {found} lines with + or -: "
                f"they differ from step {number} on (counted from 0)"
            )
        signs.append(sign)
        position += len(piece) + 1
    if label[position:].strip():
        raise ValueError(f"label continues after the last step of input: {label[position:].strip()[:30]!r}")
    return signs


class _Prefix(Layout):
    solution_prefix: str
    mc_value: float = Field(ge=0, le=1, strict=False)


class _OmegaPRM(Layout):
    question: str
    final_answer: str
    reasoning_steps: list[_Prefix] = Field(min_length=1)


def parse_omegaprm(row: dict[str, Any]) -> ImportedRow:
    """OmegaPRM (MATH-APS): a tree of prefixes of solutions with the share of rollouts that got the answer.

    Every leaf of the tree is one solution. Its steps are what each longer prefix adds; a step is 1 where
    ``mc_value`` > 0, else 0 (a prefix estimated more than once: where any is > 0). A leaf with a ``\\boxed``
    answer is finished: outcome 0 where its ``mc_value`` is 0, 1 where it is positive and the last box holds
    the gold answer as written, else null (such leaves continue past the answer). Other leaves are
    beginnings: outcome null.
    """
    raw = _OmegaPRM.model_validate(row)
    reached: dict[str, bool] = {}
    for number, node in enumerate(raw.reasoning_steps):
        if not node.solution_prefix.startswith(raw.question):
            raise ValueError(f"reasoning_steps.{number}: solution_prefix does not begin with the question")
        tail = node.solution_prefix[len(raw.question) :].strip()
        if tail:
            reached[tail] = reached.get(tail, False) or node.mc_value > 0
    if not reached:
        raise ValueError("the solution is empty: every solution_prefix is the question alone")
    ordered = sorted(reached)  # what begins with a prefix follows it directly
    leaves = [text for text, after in pairwise([*ordered, ""]) if not after.startswith(text)]
    return ImportedRow(solutions=tuple(_omegaprm_leaf(raw, leaf, reached) for leaf in leaves))


def _omegaprm_leaf(raw: _OmegaPRM, leaf: str, reached: dict[str, bool]) -> ImportedSolution:
    chain = sorted((text for text in reached if leaf.startswith(text)), key=len)
    ends = [len(text) for text in chain]
    # the white space between two steps closes the earlier one
    ends = [end + len(leaf[end:]) - len(leaf[end:].lstrip()) for end in ends]
    steps = [leaf[start:end] for start, end in pairwise([0, *ends])]
    labels: list[Label] = [1 if reached[text] else 0 for text in chain]
    stated = extract_answer(leaf) if "\\boxed" in leaf else None
    outcome: Label = None
    if stated is not None:
        outcome = (same_answer(stated, raw.final_answer) or None) if reached[leaf] else 0
    number = f"{problem_id_of(raw.question)}/{digest(leaf)}"
    finished = stated is not None
    return solution("omegaprm", number, raw.question, raw.final_answer, steps, labels, outcome, finished=finished)

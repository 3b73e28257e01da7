"""The layouts of TRL's trainers: unpaired preference (KTO), preference (DPO), stepwise supervision."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from megatron_stepkto.answers.final_answer import extract_answer
from megatron_stepkto.base.records import Label
from megatron_stepkto.base.tables import as_flag
from megatron_stepkto.problems.imported.solution import (
    ImportedRow,
    ImportedSolution,
    Turn,
    digest,
    joined,
    solution,
)
from megatron_stepkto.steps.text import split_text

STEP_END = "\n"  # TRL's default step_separator
COLUMNS = {
    "trl_kto": frozenset({"prompt", "completion", "label"}),
    "trl_dpo": frozenset({"prompt", "chosen", "rejected"}),
    "trl_stepwise": frozenset({"prompt", "completions", "labels", "label"}),
}
_ROLES = ("system", "user", "assistant")


def parse_trl_kto(row: dict[str, Any]) -> ImportedRow:
    """Unpaired preference: ``prompt, completion, label``. The label is the outcome; lines are steps without labels."""
    completion, outcome = _response(row["completion"], "completion"), _label(row["label"], "label")
    number = digest(json.dumps([row["prompt"], completion, outcome]))
    return ImportedRow(solutions=(_solution("trl_kto", number, row["prompt"], completion, outcome),))


def parse_trl_dpo(row: dict[str, Any]) -> ImportedRow:
    """Preference: ``prompt, chosen, rejected``, as texts or messages: a right and a wrong solution of one problem.

    Without ``prompt``, or where only the answers are messages, the prompt is what both begin with (as in TRL's
    ``maybe_extract_prompt``).
    """
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if prompt is None or (isinstance(prompt, str) and isinstance(chosen, list)):
        prompt, chosen, rejected = _shared(chosen, rejected)
    right, wrong = _response(chosen, "chosen"), _response(rejected, "rejected")
    if right == wrong:
        raise ValueError("chosen and rejected are equal; expected two different answers")
    number = digest(json.dumps([prompt, right, wrong]))
    return ImportedRow(
        solutions=(
            _solution("trl_dpo", f"{number}/chosen", prompt, right, 1),
            _solution("trl_dpo", f"{number}/rejected", prompt, wrong, 0),
        )
    )


def parse_trl_stepwise(row: dict[str, Any]) -> ImportedRow:
    """Stepwise supervision: ``prompt, completions, labels``, and where there is one ``label``, the outcome.

    A label of null is a step that was not judged. TRL puts a newline after each step; so do we.
    """
    steps, labels = row["completions"], row["labels"]
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise ValueError(f"expected completions to be a list of texts, got {_shown(steps)}")
    if not isinstance(labels, list) or len(labels) != len(steps):
        found = f"{len(labels)} labels" if isinstance(labels, list) else _shown(labels)
        raise ValueError(f"expected one label per step, got {found} for {len(steps)} completions")
    judged = [_label(label, f"labels.{number}") for number, label in enumerate(labels)]
    outcome = _label(row["label"], "label") if "label" in row else None
    number = digest(json.dumps([row["prompt"], steps, judged, outcome]))
    texts = joined(steps, STEP_END)
    return ImportedRow(solutions=(_solution("trl_stepwise", number, row["prompt"], texts, outcome, judged),))


def _solution(
    source: str, number: str, prompt: Any, response: str | Sequence[str], outcome: Label,
    labels: Sequence[Label] | None = None,
) -> ImportedSolution:  # fmt: skip
    steps: Sequence[str] = (
        [response[a:b] for a, b in split_text(response, "line")] if isinstance(response, str) else response
    )
    turns = _turns(prompt)
    problem = turns[0].content if len(turns) == 1 else "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)
    # a conversation is no problem that could be sampled for again: it gets no answer, so no Problem record
    answer = extract_answer("".join(steps)) if outcome == 1 and len(turns) == 1 else None
    labels = [None] * len(steps) if labels is None else labels
    asked = turns if len(turns) > 1 else ()
    return solution(source, number, problem, answer, steps, labels, outcome, turns=asked)


def _turns(prompt: Any) -> tuple[Turn, ...]:
    if isinstance(prompt, str):
        return (Turn(role="user", content=prompt),)
    turns = _messages(prompt, "prompt")
    if not turns or turns[-1].role != "user":
        found = turns[-1].role if turns else "no messages"
        raise ValueError(f"expected prompt to end with a message of the user, got {found}")
    return turns


def _messages(messages: Any, name: str) -> tuple[Turn, ...]:
    if not isinstance(messages, list):
        raise ValueError(f"expected {name} to be a text or a list of messages, got {_shown(messages)}")
    turns = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(
                f"{name}.{number}: expected a message with role and content as text, got {_shown(message)}"
            )
        if message.get("role") not in _ROLES or message.get("tool_calls"):
            raise ValueError(f"{name}.{number}: expected a message of {', '.join(_ROLES)}, got {_shown(message)}")
        turns.append(Turn(role=message["role"], content=message["content"]))
    return tuple(turns)


def _response(answer: Any, name: str) -> str:
    if isinstance(answer, str):
        return answer
    turns = _messages(answer, name)
    if [turn.role for turn in turns] != ["assistant"]:
        found = ", ".join(turn.role for turn in turns) or "none"
        raise ValueError(f"expected {name} to be a text or one message of the assistant, got messages of {found}")
    return turns[0].content


def _shared(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """What both sides begin with, and the rest of each; TRL leaves a space before the difference to the answers."""
    if not isinstance(chosen, str | list) or type(chosen) is not type(rejected):
        raise ValueError(f"expected chosen and rejected as texts or messages, got {_shown(chosen)}, {_shown(rejected)}")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if isinstance(chosen, str) and shared and chosen[shared - 1] == " ":
        shared -= 1
    if not shared:
        raise ValueError("missing key 'prompt', and chosen and rejected do not begin with the same prompt")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _label(value: Any, name: str) -> Label:
    """true or 1, false or 0, null; 1.0 and 0.0 are what pandas makes of labels with gaps; in CSV, texts of these."""
    value = as_flag(value)
    if value is None or (isinstance(value, int | float) and value in (0, 1)):
        return None if value is None else 1 if value else 0
    raise ValueError(f"{name}: expected true, false or null, got {_shown(value)}")


def _shown(value: Any) -> str:
    return f"{json.dumps(value, default=str):.60}"

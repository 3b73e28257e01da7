"""How generative reward models are asked, and how their verdicts are read: text in, labels out.

Each was trained on one layout, which these follow; votes and thresholds are as for any language model (``llm.py``).

- ``genprm`` (GenPRM, arXiv 2504.00891; src/prm_evaluation/eval_logic/processbench.py of RyanLiu112/GenPRM, and the card
  of its data set GenPRM-MATH-Data): a conversation with one turn per step. The problem stands before the first step.
  An answer is ``<analyze>``, ``<verify>`` with Python code, and ``<output>`` with ``\\boxed{Yes}`` or ``\\boxed{No}``.
- ``thinkprm`` (ThinkPRM, arXiv 2504.16828; utils/helper.py and prm/thinkprm_api.py of mukhal/ThinkPRM): one chain over
  all steps, "Step 1: ... The step is \\boxed{correct}", which ends at the first incorrect step or with "Is the solution
  correct?".
- ``r_prm`` (R-PRM, arXiv 2503.21295; src/prompts and src/utils/generate-PRM-CoT-dataset.py of NJUNLP/R-PRM): one
  request per step, which shows the steps before it; an answer ends with "Verification: Is the step correct (Yes/No)?
  Yes".

The authors of GenPRM run the code that the model writes and show it the output. Here a model's text is data: code is
never run, and what the model itself writes as its output counts for nothing but what the model makes of it. Readers are
strict: a step on which there is no verdict, or two that differ, has none.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from megatron_stepkto.base.records import Label

YES_NO: dict[str, Label] = {"yes": 1, "no": 0}


class Format(ABC):
    """One layout. ``conversation``: a step's request repeats the steps and answers before it."""

    system: ClassVar[str | None] = None
    conversation: ClassVar[bool] = False

    @abstractmethod
    def prompts(self, problem: str, steps: Sequence[str]) -> list[str]:
        """The user's messages: one for all steps, or one for each."""

    @abstractmethod
    def read(self, text: str, num_steps: int) -> list[Label]:
        """Labels of the steps that one answer is about; None where it has no verdict on a step.

        Args:
            text: an answer that the model ended itself.
            num_steps: all steps, or 1 where each has its own message.
        """

    @classmethod
    def reading(cls) -> str:
        """The code that turns answers into labels: a part of the key of kept votes."""
        return inspect.getsource(cls)


class GenPRM(Format):
    system = "You are a math teacher. Your task is to review and critique the paragraphs in solution step by step."
    conversation = True

    def prompts(self, problem: str, steps: Sequence[str]) -> list[str]:
        return [f"{problem}\n{step}" if number == 0 else step for number, step in enumerate(steps)]

    def read(self, text: str, num_steps: int) -> list[Label]:
        """The box of the answer's only ``<output>``; boxes in the analysis, in code or in its output do not count."""
        outputs = re.findall(r"<output>(.*?)</output>", text, flags=re.DOTALL)
        if len(outputs) != 1 or text.count("<output>") != 1:
            return [None]
        return [_only(re.findall(r"\\boxed\{\s*(Yes|No)\s*\}", outputs[0]))]


class ThinkPRM(Format):
    def prompts(self, problem: str, steps: Sequence[str]) -> list[str]:
        # a step's own number is replaced, or the chain would count by it
        bare = [re.sub(r"^(?:#+ *)?Step \d+ *[:.]", "", step).strip() for step in steps]
        solution = "\n".join(f"Step {number}: {step}" for number, step in enumerate(bare, 1))
        return [
            "You are given a math problem and a proposed step-by-step solution:\n\n"
            f"[Math Problem]\n\n{problem}\n\n[Solution]\n\n{solution}\n\n"
            "Review and critique each step in the proposed solution to determine whether each step is correct. "
            "If the solution is incomplete, only verify the provided steps."
        ]

    def read(self, text: str, num_steps: int) -> list[Label]:
        """A verdict belongs to the "Step N:" before it. The chain must go through the steps in order.

        What follows "Is the solution correct?", ``</think>`` or the first incorrect step is not read: the model was
        trained on chains that end there.
        """
        chain = re.split(r"Is the solution correct\?|</think>", text, maxsplit=1)[0]
        parts = re.split(r"^[*# ]*Step (\d+)\b[^\n:]{0,20}:", chain, flags=re.MULTILINE)
        labels: list[Label] = [None] * num_steps
        for place, (number, critique) in enumerate(zip(parts[1::2], parts[2::2], strict=True)):
            if int(number) != place + 1 or place >= num_steps:
                break  # out of step: whose verdicts follow is not known
            labels[place] = _only(re.findall(r"\\boxed\{\s*(correct|incorrect)\s*\}", critique))
            if labels[place] == 0:
                break
        return labels


class RPRM(Format):
    """The instructions are the user's (``judge.process.prompt``): theirs are a page, and not ours to copy."""

    def __init__(self, template: str) -> None:
        self._template = template

    def prompts(self, problem: str, steps: Sequence[str]) -> list[str]:
        first = "Since the Now Step is the first step, there are no Previous Steps."
        numbered = [f"Step {number}: {step}" for number, step in enumerate(steps, 1)]
        values = [(problem, "\n".join(numbered[:place]) or first, step) for place, step in enumerate(numbered)]
        return [_fill(self._template, each) for each in values]

    def read(self, text: str, num_steps: int) -> list[Label]:
        """As the authors filter their data: the sentence stands once, at the end."""
        question = r"Verification: Is the step correct \(Yes/No\)\?"
        found = re.search(rf"{question} *(Yes|No)[.*]*\s*$", text)
        return [YES_NO[found[1].lower()] if found and len(re.findall(question, text)) == 1 else None]


def _only(verdicts: Sequence[str]) -> Label:
    """The label that all verdicts on one step give; None where there is none, or two differ."""
    words = {verdict.lower() for verdict in verdicts}
    if len(words) != 1:
        return None
    return 1 if words <= {"yes", "correct"} else 0


def _fill(template: str, values: Sequence[str]) -> str:
    """Put the values in the places of ``{}``, each value as it is."""
    pieces = template.split("{}")
    return "".join(piece + value for piece, value in zip(pieces, [*values, ""], strict=True))

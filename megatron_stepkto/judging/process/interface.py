"""What every process judge takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import Label, Problem, Step
from megatron_stepkto.base.stage import input_hash


@dataclass(frozen=True)
class Solution:
    """A solution to judge. ``steps`` are not labelled; token ids are the sampler's own.

    Where a solution comes as text alone, the token ids are empty and so are the steps' token spans.
    """

    solution_id: str
    problem: Problem
    text: str
    steps: tuple[Step, ...]
    prompt_token_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    finished: bool = True

    @property
    def step_texts(self) -> list[str]:
        return [self.text[step.start : step.end] for step in self.steps]


@dataclass(frozen=True)
class Workplace:
    """Where a judge keeps its unfinished work, and what it may need from around it.

    ``directory/cache`` holds answers keyed by all that decides them: it outlives a change of the recipe.
    ``model`` is the Hugging Face folder of the model that sampled. ``hashes`` keeps the hashes of large folders.
    """

    directory: Path
    model: Path | None = None
    seed: int = 0
    workers: int = 2  # processes that split, apply rules, decide answer equivalence
    timeout_s: float = 5.0
    hashes: Path | None = None

    def hash_of(self, model: Path) -> str:
        """Hash of a model's content: its weights may change under the same path."""
        return input_hash(model, self.hashes)


@dataclass(frozen=True)
class Verdict:
    """A step's label, and what it was decided from.

    ``votes``: single opinions (answers of a model, rollouts). ``score``: the share or probability of "right".
    """

    label: Label
    votes: tuple[Label, ...] | None = None
    score: float | None = None


Verdicts = list[Verdict] | UserError  # an error: this one solution cannot be judged


class ProcessJudge(Protocol):
    """Labels the steps of solutions: 1 right, 0 wrong, None not judged."""

    @property
    def name(self) -> str: ...

    def check(self) -> None:
        """Find out, before there are solutions, whether anything can be judged here and now.

        Raises:
            UserError: it cannot, for what ``judge`` would say, too: a server is down, a package is missing.
        """
        ...

    def judge(self, solutions: Sequence[Solution]) -> list[Verdicts]:
        """One verdict per step, or the reason why a solution has none; shows its progress.

        Raises:
            UserError: nothing can be judged (a server is down, a model is missing).
        """
        ...

    def counts(self) -> dict[str, Any]:
        """What the manifest should say of the work: requests, tokens, retries."""
        ...


def majority(votes: Sequence[Label], threshold: float) -> Verdict:
    """The label that more than ``threshold`` of all votes give (all of them at 1.0); None where neither does.

    A vote of None counts as a vote for neither, so a tie, or too much doubt, is not judged.
    """
    counted = tuple(votes)
    for label in (1, 0):
        share = counted.count(label) / len(counted) if counted else 0.0
        if share > threshold or share == 1.0:
            return Verdict(1 if label else 0, counted, counted.count(1) / len(counted))
    return Verdict(None, counted, counted.count(1) / len(counted) if counted else None)


def cut_after_first_error(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Labels after the first wrong step become None; what they were decided from stays."""
    kept, wrong = [], False
    for verdict in verdicts:
        kept.append(Verdict(None, verdict.votes, verdict.score) if wrong else verdict)
        wrong = wrong or verdict.label == 0
    return kept

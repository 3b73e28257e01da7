"""Several judges of one step: each keeps its own opinion, and a rule makes one label of them.

Published process reward models are weak inside solutions whose answer is right, and language models flag too much
there; a second opinion keeps what both, or most, see. What the members do not agree on is null, never a guess.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_stepkto.base.errors import StageFailed, UserError
from megatron_stepkto.base.records import Label
from megatron_stepkto.judging.process.interface import (
    Judged,
    ProcessJudge,
    Resources,
    Solutions,
    Verdict,
    Verdicts,
    Workplace,
)
from megatron_stepkto.recipe import keys as recipe


def label_of_all(labels: Sequence[Label]) -> Label:
    """The label that every member gives; None where one gives none."""
    return labels[0] if len(set(labels)) == 1 else None


def label_of_majority(labels: Sequence[Label]) -> Label:
    """The label that more than half of all members give; a member without one counts for neither."""
    return next((label for label in (1, 0) if 2 * labels.count(label) > len(labels)), None)


def first_label(labels: Sequence[Label]) -> Label:
    """The label of the first member that gives one: a rule's verdict stands, else a model's."""
    return next((label for label in labels if label is not None), None)


def label_with_wrong_confirmed(labels: Sequence[Label]) -> Label:
    """The first member's label; its "wrong" only where another member says so too."""
    return labels[0] if labels[0] != 0 or 0 in labels[1:] else None


RULES: dict[str, Callable[[Sequence[Label]], Label]] = {
    "all": label_of_all,
    "majority": label_of_majority,
    "first": first_label,
    "confirm_wrong": label_with_wrong_confirmed,
}


class CombinedJudge(ProcessJudge[recipe.CombinedJudge]):
    """Asks its members one after another. They share a workplace: each finds what it, or the same judge alone, has
    answered before in the cache, whatever became of the others."""

    recipe_keys = recipe.CombinedJudge

    def __init__(
        self, settings: recipe.CombinedJudge, place: Workplace | None, members: Sequence[ProcessJudge[Any]]
    ) -> None:
        super().__init__(settings, place)
        self._members = _named(members)

    @property
    def name(self) -> str:
        return f"{self.settings.rule}({', '.join(self._members)})"

    def members(self) -> Mapping[str, ProcessJudge[Any]]:
        return self._members

    def key(self) -> dict[str, Any]:
        kept = {"kind": self.settings.kind, "rule": self.settings.rule}
        return {**kept, "judges": [member.key() for member in self._members.values()]}

    def inputs(self) -> dict[str, Path]:
        return {
            f"judges.{number}.{name}": path
            for number, member in enumerate(self._members.values())
            for name, path in member.inputs().items()
        }

    def resources(self) -> Resources:
        """Members work one after another: the most GPUs that one needs, and every server."""
        needs = [member.resources() for member in self._members.values()]
        most = max(needs, key=lambda need: need.gpus)
        servers = dict.fromkeys(url for need in needs for url in need.servers)
        return Resources(most.gpus, most.gpu_keys, most.takes_fewer, tuple(servers))

    def load(self) -> None:
        for number, member in enumerate(self._members.values()):
            with _named_keys(number):
                member.load()

    def check(self) -> None:
        for number, member in enumerate(self._members.values()):
            with _named_keys(number):
                member.check()

    def judge(self, solutions: Solutions) -> Judged:
        """A solution that one member cannot judge is not judged."""
        with contextlib.ExitStack() as stack:
            given = [
                stack.enter_context(contextlib.closing(_verdicts(number, member, solutions)))
                for number, member in enumerate(self._members.values())
            ]
            yield from map(self._combined, zip(*given, strict=True))

    def _combined(self, given: Sequence[Verdicts]) -> Verdicts:
        steps = []
        for number, (name, verdicts) in enumerate(zip(self._members, given, strict=True)):
            if isinstance(verdicts, UserError):
                return UserError(f"{name}: {_of_member(number, verdicts)}")
            steps.append(verdicts)
        rule = RULES[self.settings.rule]
        return [
            Verdict(
                rule([verdict.label for verdict in step]), members=dict(zip(self._members, step, strict=True))
            )
            for step in zip(*steps, strict=True)
        ]  # fmt: skip

    def counts(self) -> dict[str, Any]:
        return {"judges": {name: member.counts() for name, member in self._members.items()}}


def _verdicts(number: int, member: ProcessJudge[Any], solutions: Solutions) -> Judged:
    with _named_keys(number):
        yield from member.judge(solutions)


@contextlib.contextmanager
def _named_keys(number: int) -> Iterator[None]:
    """A member's errors name its own keys."""
    try:
        yield
    except (UserError, StageFailed) as error:
        raise type(error)(_of_member(number, error)) from None


def _of_member(number: int, error: Exception) -> str:
    """A member's message with the place that its keys have in the recipe."""
    return str(error).replace("judge.process", f"judge.process.judges.{number}")


def _named(members: Sequence[ProcessJudge[Any]]) -> dict[str, ProcessJudge[Any]]:
    """Members by name; later ones of the same name are numbered: two prompts of one model."""
    seen: Counter[str] = Counter()
    named = {}
    for member in members:
        seen[member.name] += 1
        named[member.name if seen[member.name] == 1 else f"{member.name}#{seen[member.name]}"] = member
    return named

"""Judges that need no model: exact rules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.judging.process.interface import Solution, Verdict, Verdicts


class RuleJudge:
    """Applies a rule to every solution, in several processes; finished labels are kept in ``directory/cache``."""

    def __init__(self, name: str, directory: Path, workers: int) -> None:
        self.name, self._directory, self._workers = name, directory, workers

    def check(self) -> None:
        """A rule needs nothing."""

    def judge(self, solutions: Sequence[Solution]) -> list[Verdicts]:
        from megatron_stepkto.judging.row_tasks import run_task

        rows = [[s.problem.problem, s.text, [[step.start, step.end] for step in s.steps]] for s in solutions]
        found = run_task(
            "labels", {"rule": self.name}, rows, self._directory, self._workers, "judging steps", "solutions"
        )
        return [row if isinstance(row, UserError) else [Verdict(label) for label in row] for row in found]

    def counts(self) -> dict[str, Any]:
        return {}

"""Judges that need no model: exact rules."""

from __future__ import annotations

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.progress import ProgressBar
from megatron_stepkto.judging.process.interface import Judged, ProcessJudge, Solutions, Verdict
from megatron_stepkto.judging.row_tasks import run_task
from megatron_stepkto.recipe import keys as recipe


class RuleJudge(ProcessJudge[recipe.RuleJudge]):
    """Applies a rule to every solution, in several processes; keeps finished labels in the cache."""

    recipe_keys = recipe.RuleJudge

    @property
    def name(self) -> str:
        return self.settings.kind

    def judge(self, solutions: Solutions) -> Judged:
        rows = ([s.problem.problem, s.text, [[step.start, step.end] for step in s.steps]] for s in solutions)
        place = self.place
        with ProgressBar("judging steps", len(solutions), "solutions") as bar:
            for row in run_task("labels", {"rule": self.name}, rows, place.folder, place.workers, bar):
                yield row if isinstance(row, UserError) else [Verdict(label) for label in row]

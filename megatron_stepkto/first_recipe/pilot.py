"""A few solutions of the model itself: their ends, steps and answers decide prompt, limits and the split of steps."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_stepkto.base.records import Problem, Sample, read_records
from megatron_stepkto.judging.single import judge_answers, label_steps
from megatron_stepkto.recipe.keys import Prompt, Sampling
from megatron_stepkto.recipe.prompts import Prompts
from megatron_stepkto.sampling.draw import new_drawing
from megatron_stepkto.sampling.job import Pass, PromptRow
from megatron_stepkto.steps.text import SplitRule, split_text

# The more specific one first: headings of steps stand between blank lines, and these between lines.
SPLITS: tuple[SplitRule, ...] = ("step_heading", "step_number", "blank_line", "line", "sentence")
ENOUGH = 0.6  # share of solutions that a rule must cut into two steps or more
TRUSTED = 0.9  # share of solutions that must end before the limit of the pilot, for their lengths to set the limit


@dataclass(frozen=True)
class Cut:
    """``split``, the share of solutions that it cuts into two steps or more, and the median number of steps."""

    split: SplitRule
    share: float
    steps: float


@dataclass(frozen=True)
class Pilot:
    """Sampled solutions, one per problem, at temperature 1.

    finished: tokens of each solution that ended by itself. right: how many answers are right. limit: tokens of the
    longest response that was allowed. speed: tokens per second of one engine, 0 where unknown.
    """

    problems: tuple[Problem, ...]
    texts: tuple[str, ...]
    tokens: tuple[int, ...]
    finished: tuple[int, ...]
    right: int
    limit: int
    speed: int

    @property
    def count(self) -> int:
        return len(self.texts)

    @property
    def ends(self) -> bool:
        """Do nearly all solutions end by themselves?"""
        return len(self.finished) >= TRUSTED * self.count

    @property
    def mean_tokens(self) -> int:
        return max(1, round(statistics.fmean(self.tokens)))

    def cut(self) -> Cut:
        """The first rule of ``SPLITS`` that cuts most solutions, or else the one that cuts the most."""
        cuts = [Cut(split, *self._steps(split)) for split in SPLITS]
        return next((cut for cut in cuts if cut.share >= ENOUGH), max(cuts, key=lambda cut: cut.share))

    def _steps(self, split: SplitRule) -> tuple[float, float]:
        counts = [len(split_text(text, split)) for text in self.texts]
        return sum(count > 1 for count in counts) / self.count, statistics.median(counts)

    def judged(self, split: SplitRule) -> tuple[int, int, int]:
        """(steps, those that the rule ``equations`` calls right, those that it calls wrong)."""
        labels = [
            step.label
            for problem, text in zip(self.problems, self.texts, strict=True)
            for step in label_steps(text, problem=problem.problem, split=split)
        ]
        return len(labels), labels.count(1), labels.count(0)


def sample_some(model: Path, problems: Sequence[Problem], prompt: Prompt, settings: Sampling) -> Pilot:
    """One solution of each problem, sampled by the engine that the run will use.

    Raises:
        UserError: the engine refuses the model or the machine. StageFailed: it died; its log is in the message.
    """
    prompts = Prompts.of(prompt, model)
    rows = [PromptRow(problem_id=p.problem_id, token_ids=prompts.token_ids(p.problem)) for p in problems]
    pass_ = Pass(name="pilot", num_samples=1, temperature=1.0, top_p=1.0)
    with tempfile.TemporaryDirectory(prefix="stepkto-init-") as folder:
        drawing = new_drawing(model, "M0", rows, [pass_], settings, 0, Path(folder), title="a few solutions")
        drawing.draw()
        drawn = drawing.finish()
        samples = list(read_records(drawn.paths["pilot"], Sample))
    texts = tuple(sample.text for sample in samples)
    outcomes = judge_answers(texts, [problem.answer or "" for problem in problems])
    return Pilot(
        problems=tuple(problems),
        texts=texts,
        tokens=tuple(len(sample.token_ids) for sample in samples),
        finished=tuple(len(sample.token_ids) for sample in samples if sample.finish_reason == "stop"),
        right=sum(outcome.label == 1 for outcome in outcomes),
        limit=settings.max_tokens,
        speed=int(drawn.counts.get("tokens_per_second_per_engine", 0)),
    )

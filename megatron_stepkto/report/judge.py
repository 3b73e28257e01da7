"""How far the process judge's verdicts agree with the final answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_stepkto.base.records import Label
from megatron_stepkto.evaluation.statistics import Interval, wilson_interval
from megatron_stepkto.report.solutions import Solution


@dataclass(frozen=True)
class AgreementRow:
    """Of ``num`` solutions that the judge sees alike, the share with a right answer (Wilson's 95% interval)."""

    title: str
    num: int
    share: float
    share_interval: Interval


def agreement(solutions: Iterable[Solution]) -> list[AgreementRow]:
    """Solutions with a decided answer, by the number of steps that the judge calls wrong.

    A judge that can be trusted separates the rows: many right answers above, few below. Rows without a solution
    stay out.
    """
    titles = ("no wrong step", "one wrong step", "two wrong steps or more", "no step judged")
    outcomes: dict[str, list[Label]] = {title: [] for title in titles}
    for solution in solutions:
        labels = [step.label for step in solution.steps if step.label is not None]
        group = titles[min(labels.count(0), 2)] if labels else titles[3]
        outcomes[group].append(solution.outcome)
    return _rows(outcomes)


def calibration(solutions: Iterable[Solution], num_bins: int = 5) -> list[AgreementRow]:
    """Solutions with a decided answer and votes on every judged step, by the step that fewest judges call right.

    Empty for judges that cast a single vote. Bins are equal parts of [0, 1]; the last holds 1.
    """
    titles = [f"{100 * index // num_bins}–{100 * (index + 1) // num_bins}%" for index in range(num_bins)]
    outcomes: dict[str, list[Label]] = {title: [] for title in titles}
    for solution in solutions:
        shares = [step.right_votes / step.num_votes for step in solution.steps if step.num_votes > 1]
        if shares:
            outcomes[titles[min(int(min(shares) * num_bins), num_bins - 1)]].append(solution.outcome)
    return _rows(outcomes)


def _rows(groups: Mapping[str, Sequence[Label]]) -> list[AgreementRow]:
    """A row for each group of outcomes, of which only the decided ones count."""
    rows = []
    for title, outcomes in groups.items():
        right, num = outcomes.count(1), len(outcomes) - outcomes.count(None)
        if num:
            rows.append(AgreementRow(title, num, right / num, wilson_interval(right, num)))
    return rows

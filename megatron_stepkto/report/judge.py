"""How far the process judge's verdicts agree with the final answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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
    decided = [solution for solution in solutions if solution.outcome is not None]

    def wrong(solution: Solution) -> int:
        return sum(step.label == 0 for step in solution.steps)

    def judged(solution: Solution) -> bool:
        return any(step.label is not None for step in solution.steps)

    return _rows(
        decided,
        [
            ("no wrong step", lambda s: judged(s) and wrong(s) == 0),
            ("one wrong step", lambda s: wrong(s) == 1),
            ("two wrong steps or more", lambda s: wrong(s) >= 2),
            ("no step judged", lambda s: not judged(s)),
        ],
    )


def calibration(solutions: Iterable[Solution], num_bins: int = 5) -> list[AgreementRow]:
    """Solutions with a decided answer and votes on every judged step, by the step that fewest judges call right.

    Empty for judges that cast a single vote. Bins are equal parts of [0, 1]; the last holds 1.
    """
    weakest: list[tuple[float, Solution]] = []
    for solution in solutions:
        shares = [step.right_votes / step.num_votes for step in solution.steps if step.num_votes > 1]
        if shares and solution.outcome is not None:
            weakest.append((min(shares), solution))
    bins = [min(int(share * num_bins), num_bins - 1) for share, _ in weakest]
    members = [[s for b, (_, s) in zip(bins, weakest, strict=True) if b == index] for index in range(num_bins)]
    return [
        row
        for index, part in enumerate(members)
        for row in _rows(part, [(f"{100 * index // num_bins}–{100 * (index + 1) // num_bins}%", lambda _: True)])
    ]


def _rows(
    solutions: Sequence[Solution], groups: Sequence[tuple[str, Callable[[Solution], bool]]]
) -> list[AgreementRow]:
    rows = []
    for title, belongs in groups:
        outcomes = [solution.outcome for solution in solutions if belongs(solution)]
        if outcomes:
            right = outcomes.count(1)
            interval = wilson_interval(right, len(outcomes))
            rows.append(AgreementRow(title, len(outcomes), right / len(outcomes), interval))
    return rows

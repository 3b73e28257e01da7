"""What a process judge's labels are worth beside those of people: measures of labels alone, no file and no judge.

People judged each solution up to the first wrong step. ProcessBench's measure (arXiv 2412.06559) asks for that
step: a judge predicts the first step that it calls wrong, or -1 where it calls none wrong. *Error accuracy* is
the share of erroneous solutions whose first wrong step it names exactly, *correct accuracy* the share of correct
ones in which it calls no step wrong, F1 their harmonic mean. A judge that judges nothing predicts -1 always: it
has correct accuracy 100% and F1 0.

What training sees are single labels, so they are counted too, on the steps that people judged: the precision of
"wrong" and of "right", the share of wrong and right steps that are found, and the share that is judged at all; once
over all solutions, and once inside solutions whose final answer is right. Only there does a step label say what the
answer does not, and there published judges are weakest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_stepkto.base.records import Label
from megatron_stepkto.evaluation.statistics import (
    Share,
    bootstrap_interval,
    clustered_share,
    mcnemar_exact,
    plain_share,
)

RESAMPLES = 2000
NUM_BINS = 10  # of scores
Steps = Sequence[Sequence[tuple[Label, Label]]]  # human labels and the judge's, on the steps that people judged


@dataclass(frozen=True)
class Judged:
    """One solution: human labels and the judge's, step by step.

    ``scores``: the judge's, one per step; empty where it gave none. ``outcome``: whether the final answer is right.
    """

    gold: tuple[Label, ...]
    given: tuple[Label, ...]
    scores: tuple[float | None, ...] = ()
    outcome: Label = None

    @property
    def error(self) -> int:
        """ProcessBench's label: the first wrong step, -1 for none."""
        return first_wrong(self.gold)

    @property
    def found(self) -> bool:
        return first_wrong(self.given) == self.error

    @property
    def pairs(self) -> list[tuple[Label, Label]]:
        """Human labels and the judge's on the steps that people judged."""
        return [pair for pair in zip(self.gold, self.given, strict=True) if pair[0] is not None]


def first_wrong(labels: Sequence[Label]) -> int:
    return next((number for number, label in enumerate(labels) if label == 0), -1)


def f1(error_accuracy: float | None, correct_accuracy: float | None) -> float | None:
    """Harmonic mean of the two accuracies, as ProcessBench defines it; 0 where both are 0."""
    if error_accuracy is None or correct_accuracy is None:
        return None
    total = error_accuracy + correct_accuracy
    return 2 * error_accuracy * correct_accuracy / total if total else 0.0


def _f1_interval(errors: Sequence[bool], corrects: Sequence[bool]) -> list[float] | None:
    """95% percentile bootstrap over solutions, erroneous and correct ones apart."""
    if not errors or not corrects:
        return None
    rng = random.Random(0)
    counts = [(len(flags), sum(flags) / len(flags)) for flags in (errors, corrects)]
    # resampling n flags with replacement draws the number of successes from a binomial distribution
    values = sorted(
        f1(*(sum(rng.random() < share for _ in range(size)) / size for size, share in counts)) or 0.0
        for _ in range(RESAMPLES)
    )
    return [values[int(0.025 * RESAMPLES)], values[int(0.975 * RESAMPLES) - 1]]


def score(rows: Sequence[Judged]) -> dict[str, Any]:
    """All measures of one source, with counts and 95% intervals (steps: clustered by solution)."""
    erroneous = [row.found for row in rows if row.error >= 0]
    correct = [row.found for row in rows if row.error < 0]
    error_accuracy, correct_accuracy = plain_share(erroneous), plain_share(correct)
    result = {
        "solutions": len(rows),
        "erroneous": len(erroneous),
        "correct": len(correct),
        **error_accuracy.named("error_accuracy"),
        **correct_accuracy.named("correct_accuracy"),
        "f1": f1(error_accuracy.value, correct_accuracy.value),
        "f1_interval": _f1_interval(erroneous, correct),
    }
    right = [row.pairs for row in rows if row.outcome == 1]
    return {
        **result,
        **_labels([row.pairs for row in rows]),
        "right_answers": {
            "solutions": len(right),
            "with_a_wrong_step": sum(any(person == 0 for person, _ in row) for row in right),
            **_labels(right),
        },
        "reliability": reliability(rows),
    }


def _labels(solutions: Steps) -> dict[str, Any]:
    """Counts and measures of single labels."""

    def share(of: Callable[[Label, Label], bool], among: Callable[[Label, Label], bool]) -> Share:
        return clustered_share(
            (sum(among(*p) and of(*p) for p in row), sum(among(*p) for p in row)) for row in solutions
        )  # fmt: skip

    return {
        "steps": {
            f"people_{person}_judge_{judge}": sum(row.count((person_label, judge_label)) for row in solutions)
            for person, person_label in (("right", 1), ("wrong", 0))
            for judge, judge_label in (("right", 1), ("wrong", 0), ("null", None))
        },
        **share(lambda p, j: j is not None, lambda p, j: True).named("judged_share"),
        **share(lambda p, j: p == 0, lambda p, j: j == 0).named("precision_of_wrong"),
        **share(lambda p, j: p == 1, lambda p, j: j == 1).named("precision_of_right"),
        **share(lambda p, j: j == 0, lambda p, j: p == 0).named("wrong_steps_found"),
        **share(lambda p, j: j == 1, lambda p, j: p == 1).named("right_steps_found"),
    }


def reliability(rows: Sequence[Judged]) -> list[dict[str, Any]]:
    """Steps by score, in ``NUM_BINS`` equal parts of [0, 1] (the last holds 1): how many people call right.

    Scores of a judge that can be believed equal that share. Parts without a step stay out.
    """
    found = []
    for place in range(NUM_BINS):
        inside = [
            [
                (score, gold)
                for score, gold in zip(row.scores, row.gold, strict=True)
                if score is not None and gold is not None and min(int(score * NUM_BINS), NUM_BINS - 1) == place
            ]
            for row in rows
            if row.scores
        ]
        scores = [score for row in inside for score, _ in row]
        if scores:
            right = clustered_share((sum(gold == 1 for _, gold in row), len(row)) for row in inside)
            found.append({
                "from": place / NUM_BINS, "to": (place + 1) / NUM_BINS, "steps": len(scores),
                "mean_score": sum(scores) / len(scores), **right.named("right"),
            })  # fmt: skip
    return found


def compare(first: Sequence[Judged], second: Sequence[Judged]) -> dict[str, Any]:
    """Two judges on the same solutions, in the same order: differences first - second.

    Solutions whose first wrong step (or its absence) one judge names and the other does not: McNemar's exact test.
    F1 and the measures of "wrong" inside right answers: 95% paired bootstrap over solutions. A difference of
    precisions is None where one of the two calls no step wrong.
    """
    assert [row.gold for row in first] == [row.gold for row in second], "the same solutions"
    only_first = sum(a.found and not b.found for a, b in zip(first, second, strict=True))
    only_second = sum(b.found and not a.found for a, b in zip(first, second, strict=True))
    counts = [_counts(rows) for rows in (first, second)]

    def difference(measure: Callable[[np.ndarray[Any, Any]], float | None]) -> dict[str, Any]:
        def of(drawn: np.ndarray[Any, Any]) -> float | None:
            values = [measure(table[drawn].sum(axis=0)) for table in counts]
            return None if values[0] is None or values[1] is None else values[0] - values[1]

        value = of(np.arange(len(first)))
        interval = None if value is None else bootstrap_interval(of, len(first))
        return {"difference": value, "interval": None if interval is None else list(interval)}

    return {
        "solutions": len(first),
        "found_only_by_first": only_first,
        "found_only_by_second": only_second,
        "p_value": mcnemar_exact(only_first, only_second),
        "f1": difference(lambda c: f1(_ratio(c[1], c[0]), _ratio(c[3], c[2]))),
        "right_answers": {
            "precision_of_wrong": difference(lambda c: _ratio(c[6], c[5])),
            "wrong_steps_found": difference(lambda c: _ratio(c[6], c[4])),
        },
    }


def _counts(rows: Sequence[Judged]) -> np.ndarray[Any, Any]:
    """int64 [solutions, 7]: erroneous, found, correct, found; steps in right answers: wrong, called wrong, both."""
    table = []
    for row in rows:
        pairs = row.pairs if row.outcome == 1 else []
        wrong, called = sum(p == 0 for p, _ in pairs), sum(j == 0 for _, j in pairs)
        error = row.error >= 0
        table.append([
            error, error and row.found, not error, not error and row.found, wrong, called, pairs.count((0, 0)),
        ])  # fmt: skip
    return np.asarray(table, dtype=np.int64).reshape(len(rows), 7)


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None

"""Shares with 95% intervals, and tests of the difference between two models: plain functions of counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Z_95 = 1.959963984540054  # 97.5% quantile of the standard normal distribution
RESAMPLES = 2000
Interval = tuple[float, float]


def wilson_interval(successes: float, trials: float) -> Interval:
    """95% interval of a proportion (Wilson 1927, as in Brown, Cai & DasGupta 2001, section 3.1.1)."""
    if trials <= 0 or not 0 <= successes <= trials:
        raise ValueError(f"expected 0 <= successes <= trials and trials > 0, got {successes} of {trials}")
    share, square = successes / trials, Z_95**2
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    half = Z_95 / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Share:
    """A share with its 95% interval, fractions of 1; both None where nothing was counted."""

    value: float | None
    interval: Interval | None

    def named(self, key: str) -> dict[str, Any]:
        """As reports hold it: the value under ``key``, the interval beside it."""
        return {key: self.value, f"{key}_interval": None if self.interval is None else list(self.interval)}


def clustered_share(clusters: Iterable[tuple[int, int]]) -> Share:
    """Sum of successes over sum of trials, where the trials of one cluster are alike (steps of one solution).

    The interval is Wilson's at the effective number of trials r (1 - r) / V, V the linearised variance of a
    ratio over n clusters of (s, m): n / (n - 1) * sum (s - r m)^2 / (sum m)^2 (Cochran 1977, section 6.3;
    Korn & Graubard 1998 for the effective number). It is at most the number of trials; where V is 0 (no
    success or nothing else) the clusters count, one trial each. With one trial per cluster V differs from
    the binomial variance by n / (n - 1) only: use ``plain_share``.

    Args:
        clusters: (successes, trials) of each; clusters without trials do not count.
    """
    counted = [(successes, trials) for successes, trials in clusters if trials]
    if not counted:
        return Share(None, None)
    num_clusters, total = len(counted), sum(trials for _, trials in counted)
    ratio = sum(successes for successes, _ in counted) / total
    effective = float(num_clusters)
    if num_clusters > 1:
        squares = sum((successes - ratio * trials) ** 2 for successes, trials in counted)
        variance = num_clusters / (num_clusters - 1) * squares / total**2
        if variance > 0:
            effective = min(ratio * (1 - ratio) / variance, float(total))
    return Share(ratio, wilson_interval(ratio * effective, effective))


def plain_share(flags: Iterable[bool]) -> Share:
    """The share of independent trials that succeed."""
    seen = list(flags)
    return Share(sum(seen) / len(seen), wilson_interval(sum(seen), len(seen))) if seen else Share(None, None)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that one of k samples is right, unbiased: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, equation 1)."""
    if not 0 <= num_right <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"expected 0 <= right <= samples and 1 <= k <= samples, got {num_right}, {num_samples}, {k}")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def bootstrap_interval(statistic: Callable[[np.ndarray[Any, Any]], float | None], num_problems: int) -> Interval | None:
    """95% percentile interval of a statistic of problems resampled with replacement (Efron 1979), ``RESAMPLES`` times.

    ``statistic`` takes the indices of the resampled problems, int64 [num_problems]; resamples for which it is None (no
    right answer among them) do not count. The seed is fixed, so an interval is the same on every machine.
    """
    rng = np.random.default_rng(0)
    drawn = (statistic(rng.integers(0, num_problems, num_problems)) for _ in range(RESAMPLES))
    values = [value for value in drawn if value is not None]
    if not values:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_mean(values: Sequence[float]) -> Share:
    """The mean of one value in [0, 1] per problem.

    Where all values are equal every resample has the same mean, and the bootstrap's interval would be a point, however
    few the problems. As in ``clustered_share`` the problems count there, one trial each, in Wilson's interval.
    """
    if not values:
        return Share(None, None)
    array = np.asarray(values, dtype=np.float64)
    if (array == array[0]).all():
        share = float(array[0])
        return Share(share, wilson_interval(share * len(array), len(array)))
    return Share(float(array.mean()), bootstrap_interval(lambda drawn: float(array[drawn].mean()), len(array)))


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p-value that two models solve equally many problems, from those that only one of them solves.

    Under the hypothesis each such problem is a fair coin: p = min(1, 2 P(X <= min(b, c))), X ~ Binomial(b + c, 1/2)
    (McNemar 1947, exact form).
    """
    trials = only_first + only_second
    tail = sum(math.comb(trials, successes) for successes in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**trials)

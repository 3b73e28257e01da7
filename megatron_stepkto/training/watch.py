"""Watching a training for collapse: right solutions becoming less likely than under the reference."""

from __future__ import annotations

from collections.abc import Sequence

WINDOW = 5  # updates in each of the three windows that are compared
BELOW = -0.1  # nats: healthy runs fluctuate around zero


def falling_below_zero(log_ratio_right: Sequence[float]) -> tuple[float, float] | None:
    """Means (nats) of the last two windows when three windows in a row fall and the last is below ``BELOW``.

    Args:
        log_ratio_right: mean log-ratio of right solutions per update, oldest first.
    Returns:
        None when nothing falls, or when there are too few updates to tell.
    """
    if len(log_ratio_right) < 3 * WINDOW:
        return None
    recent = log_ratio_right[-3 * WINDOW :]
    first, before, now = (sum(recent[i : i + WINDOW]) / WINDOW for i in (0, WINDOW, 2 * WINDOW))
    return (before, now) if now < BELOW and now < before < first else None

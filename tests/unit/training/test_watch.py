from __future__ import annotations

import pytest

from megatron_stepkto.training.watch import falling_below_zero

FIVE = 5


def test_three_falling_windows_below_zero() -> None:
    assert falling_below_zero([0.5] * FIVE + [0.0] * FIVE + [-0.5] * FIVE) == pytest.approx((0.0, -0.5))
    # only the last fifteen updates count
    assert falling_below_zero([9.0] + [0.5] * FIVE + [0.0] * FIVE + [-0.5] * FIVE) == pytest.approx((0.0, -0.5))


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([0.5] * 5 + [0.0] * 5 + [-0.05] * 5, id="about zero"),
        pytest.param([0.0] * 5 + [-3.0] * 5 + [-1.0] * 5, id="below zero, but rising"),
        pytest.param([-3.0] * 5 + [-1.0] * 5 + [-2.0] * 5, id="fell only at the end"),
        pytest.param([4.0] * 5 + [3.0] * 5 + [1.0] * 5, id="falling, but above zero"),
        pytest.param([0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0], id="too few updates"),
    ],
)
def test_no_alarm(history: list[float]) -> None:
    assert falling_below_zero(history) is None

"""The learning rate at every update, by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from megatron_stepkto.recipe.keys import Optimizer
from megatron_stepkto.training.schedule import learning_rate


def rates(num_updates: int, **keys: Any) -> list[float]:
    settings = Optimizer(lr=2.0, **keys)
    return [learning_rate(update, num_updates, settings) for update in range(num_updates)]


def test_constant() -> None:
    assert rates(3) == [2.0, 2.0, 2.0]


def test_linear_warm_up_reaches_the_rate_at_its_last_update() -> None:
    assert rates(6, warmup_updates=4) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_warm_up_longer_than_the_run() -> None:
    assert rates(2, warmup_updates=4) == pytest.approx([0.5, 1.0])


def test_cosine_by_hand() -> None:
    """cos of 0, 45, 90 and 135 degrees; 180 would be update 4."""
    half = math.sqrt(0.5)
    assert rates(4, schedule="cosine") == pytest.approx([2.0, 1 + half, 1.0, 1 - half])


def test_linear_by_hand() -> None:
    """Four updates down to a floor of 0.5 of a rate of 2; update 4 would be at the floor."""
    assert rates(4, schedule="linear", min_lr_ratio=0.5) == pytest.approx([2.0, 1.75, 1.5, 1.25])


def test_cosine_after_warm_up_down_to_a_floor() -> None:
    """Floor 0.5 of a rate of 2: 1 + (1 + cos)/2 over updates 2..5, whose angles are 0, 45, 90 and 135 degrees."""
    half = math.sqrt(0.5)
    expected = [1.0, 2.0, 2.0, 1.5 + half / 2, 1.5, 1.5 - half / 2]
    assert rates(6, schedule="cosine", warmup_updates=2, min_lr_ratio=0.5) == pytest.approx(expected)


def test_cosine_falls_all_the_way_and_never_below_the_floor() -> None:
    values = rates(1000, schedule="cosine", min_lr_ratio=0.1)
    assert all(a > b for a, b in pairwise(values))
    assert values[0] == 2.0
    assert 0.2 < values[-1] < 0.2001


def test_all_warm_up_and_no_cosine() -> None:
    assert rates(3, schedule="cosine", warmup_updates=3) == pytest.approx([2 / 3, 4 / 3, 2.0])

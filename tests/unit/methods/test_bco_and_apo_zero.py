"""BCO and APO-zero against TRL's own numbers (trl_golden.json says how they were made) and finite differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.examples import Examples
from megatron_stepkto.losses import Level, Solutions, pool_reference
from megatron_stepkto.megatron import patches
from megatron_stepkto.methods.apo_zero import apo_zero_loss
from megatron_stepkto.methods.bco import bco_loss
from megatron_stepkto.methods.registry import METHODS
from megatron_stepkto.recipe import keys as recipe
from tests.builders import random_examples

patches.install()  # objective.py works on micro-batches, which import Megatron

from megatron_stepkto.methods.objective import reference_points  # noqa: E402

GOLDEN = json.loads(Path(__file__).with_name("trl_golden.json").read_text())


def solutions(policy: Tensor, case: dict[str, Any]) -> Solutions:
    """One step each."""
    ratio = policy - torch.tensor(case["reference_logps"], dtype=torch.float64)
    label = torch.tensor(case["label"]).long()
    return Solutions(ratio, torch.arange(len(label)), label, label)


def policy_of(case: dict[str, Any]) -> Tensor:
    return torch.tensor(case["policy_logps"], dtype=torch.float64, requires_grad=True)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("case", GOLDEN["apo_zero"]["cases"], ids=lambda case: f"beta {case['beta']}")
def test_apo_zero_is_that_of_trl(case: dict[str, Any]) -> None:
    policy = policy_of(case)
    level = Level(case["beta"], case["desirable_weight"], case["undesirable_weight"], 1.0)
    found = apo_zero_loss(solutions(policy, case), level)
    loss = found.total / found.num_units
    assert loss.item() == pytest.approx(case["loss"], rel=1e-12)
    assert sum(found.parts.values()).item() == pytest.approx(found.total.item(), rel=1e-12)  # type: ignore[union-attr]
    loss.backward()
    torch.testing.assert_close(policy.grad, torch.tensor(case["grad_policy_logps"]).double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", GOLDEN["bco"]["cases"], ids=lambda case: f"beta {case['beta']}")
def test_bco_is_that_of_trl_and_its_delta_ours_of_the_next_update(case: dict[str, Any]) -> None:
    beta, level = case["beta"], Level(case["beta"], 1.0, 1.0, 1.0)
    total = count = 0.0
    for batch in case["batches"]:
        policy = policy_of(batch)
        rows = solutions(policy, batch)
        found = bco_loss(rows, scalar(batch["delta"] / beta), level)  # at TRL's delta, which counts this batch too
        loss = found.total / found.num_units
        assert loss.item() == pytest.approx(batch["loss"], abs=1e-6)
        assert sum(found.parts.values()).item() == pytest.approx(found.total.item(), rel=1e-12)  # type: ignore[union-attr]
        loss.backward()
        torch.testing.assert_close(policy.grad, torch.tensor(batch["grad_policy_logps"]).double(), rtol=1e-6, atol=1e-6)

        pooled = pool_reference(rows)[0]
        total, count = total + pooled.total.item(), count + pooled.count.item()
        sums = {"kl_outcome": total, "kl_outcome_count": count, "kl_step": 0.0, "kl_step_count": 0.0}
        ours = reference_points(sums, "running", torch.device("cpu")).outcome
        assert beta * ours.item() == pytest.approx(batch["delta"], rel=1e-6, abs=1e-6)


def test_delta_is_not_clamped() -> None:
    """A policy that leaves all solutions has a negative mean reward; KTO's reference point would be 0."""
    sums = {"kl_outcome": -6.0, "kl_outcome_count": 4.0, "kl_step": 0.0, "kl_step_count": 0.0}
    assert reference_points(sums, "running", torch.device("cpu")).outcome.item() == -1.5
    assert reference_points(sums, "batch", torch.device("cpu")).outcome.item() == 0.0


@pytest.mark.parametrize("method", ["bco", "apo_zero"])
def test_gradient_is_that_of_finite_differences(method: str) -> None:
    level, owner = Level(0.7, 1.3, 0.6, 1.0), torch.tensor([0, 0, 1, 2, 2, 3])
    label = torch.tensor([1, 0, 1, -1])  # the last is undecided

    def loss(ratio: Tensor) -> Tensor:
        rows = Solutions(ratio, owner, torch.ones(6, dtype=torch.int64), label)
        return (bco_loss(rows, scalar(0.4), level) if method == "bco" else apo_zero_loss(rows, level)).total

    ratio = torch.tensor([0.3, -1.2, 2.0, 0.1, 0.5, 4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (ratio,))
    loss(ratio).backward()
    assert ratio.grad is not None
    assert (ratio.grad[5], ratio.grad[0] < 0, ratio.grad[2] > 0) == (0, True, True)


@pytest.mark.parametrize("extreme", [5000.0, -5000.0])
def test_extreme_log_ratios_stay_finite(extreme: float) -> None:
    ratio = torch.tensor([extreme, extreme], dtype=torch.float64, requires_grad=True)
    rows = Solutions(ratio, torch.arange(2), torch.tensor([1, 0]), torch.tensor([1, 0]))
    found = bco_loss(rows, scalar(0.0), Level(0.1, 1.0, 1.0, 1.0))
    assert found.total.item() == pytest.approx(500.0)
    found.total.backward()
    assert torch.isfinite(ratio.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["bco", "apo_zero"])
def test_balanced_weights_and_data_of_another_method(method: str) -> None:
    """3 right and 1 wrong: ratio 3 -> undesirable 3 / (4/3) = 2.25."""
    examples = random_examples(4)
    examples = [e.model_copy(update={"outcome": int(i < 3)}) for i, e in enumerate(examples)]
    objective: Any = METHODS[method].objective(
        recipe.Loss(balance="auto"), Examples.of(examples), np.arange(len(examples))
    )
    assert objective.level == Level(0.1, 1.0, 2.25, 1.0)
    with pytest.raises(UserError, match=f"train: {method} learns from right against wrong, and nothing is wrong"):
        METHODS[method].objective(recipe.Loss(), Examples.of(examples[:3]), np.arange(3))
    undecided = examples[0].model_copy(update={"outcome": None})
    with pytest.raises(UserError, match=f"e0: {method} trains on solutions with a judged answer, this one's outcome"):
        METHODS[method].units(Examples.of([undecided]))

"""Step-KTO and its neighbours against hand-computed values, TRL's numbers and finite differences."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_stepkto.losses import (
    UNJUDGED,
    Balance,
    Level,
    LossSum,
    PooledMean,
    ReferencePoints,
    Solutions,
    StepKTOSettings,
    clamp_reference,
    class_balance,
    dpo_loss,
    irpo_loss,
    kto_loss,
    nll_loss,
    pool_reference,
    step_divisors,
    step_kto_loss,
)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def points(outcome: float, step: float) -> ReferencePoints:
    return ReferencePoints(torch.tensor(outcome, dtype=torch.float64), torch.tensor(step, dtype=torch.float64))


def solutions(
    steps: list[list[tuple[float, int]]], outcomes: list[int], dtype: torch.dtype = torch.float64
) -> Solutions:
    """Nested (log-ratio, label) per step."""
    flat = [(i, r, c) for i, solution in enumerate(steps) for r, c in solution]
    return Solutions(
        torch.tensor([r for _, r, _ in flat], dtype=dtype, requires_grad=True),
        torch.tensor([i for i, _, _ in flat], dtype=torch.int64),
        torch.tensor([c for _, _, c in flat], dtype=torch.int64),
        torch.tensor(outcomes, dtype=torch.int64),
    )


SETTINGS = StepKTOSettings(Level(0.5, 1.0, 0.8, 1.0), Level(2.0, 1.5, 0.7, 0.6))


def test_step_kto_by_hand() -> None:
    batch = solutions([[(0.3, 1), (-0.2, 0)], [(0.1, 1), (0.4, -1), (0.2, 1)]], [1, 0])
    # solution 0: r = 0.1, right; z_o = 0.05.  solution 1: r = 0.7, wrong.
    outcome = 1.0 * (1 - sigmoid(0.5 * (0.1 - 0.05))) + 0.8 * (1 - sigmoid(0.5 * (0.05 - 0.7)))
    step_0 = (1.5 * (1 - sigmoid(2 * (0.3 - 0.02))) + 0.7 * (1 - sigmoid(2 * (0.02 + 0.2)))) / 2
    step_1 = (1.5 * (1 - sigmoid(2 * (0.1 - 0.02))) + 1.5 * (1 - sigmoid(2 * (0.2 - 0.02)))) / 2
    result = step_kto_loss(batch, points(0.05, 0.02), SETTINGS)
    assert result.num_units == 2
    assert result.total.item() == pytest.approx(outcome + 0.6 * (step_0 + step_1), rel=1e-12)
    assert result.parts["loss_outcome"].item() == pytest.approx(outcome, rel=1e-12)
    assert result.parts["loss_step"].item() == pytest.approx(0.6 * (step_0 + step_1), rel=1e-12)


def test_sum_reduction_by_hand() -> None:
    batch = solutions([[(0.3, 1), (-0.2, 0), (9.0, -1)]], [-1])
    steps = 1.5 * (1 - sigmoid(2 * 0.3)) + 0.7 * (1 - sigmoid(2 * 0.2))
    settings = StepKTOSettings(SETTINGS.outcome, SETTINGS.step, "sum")
    assert step_kto_loss(batch, points(0.0, 0.0), settings).total.item() == pytest.approx(0.6 * steps, rel=1e-12)


def test_gradient_is_that_of_finite_differences() -> None:
    batch = solutions([[(0.3, 1), (-0.2, 0)], [(0.1, 1), (0.4, -1), (0.2, 0)], [(1.5, -1)]], [1, 0, -1])
    z = points(0.05, 0.02)
    assert torch.autograd.gradcheck(
        lambda r: (
            step_kto_loss(Solutions(r, batch.step_solution, batch.step_label, batch.outcome_label), z, SETTINGS).total
        ),
        (batch.step_log_ratio,),
    )


def test_no_gradient_flows_into_the_reference_point() -> None:
    batch = solutions([[(0.3, 1)]], [1])
    z = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    step_kto_loss(batch, ReferencePoints(z, z), SETTINGS).total.backward()
    assert z.grad is None


def golden(data_dir: Path) -> list[dict]:
    return json.loads((data_dir / "golden" / "kto_golden.json").read_text())["cases"]


def test_step_weight_zero_is_kto_of_trl(data_dir: Path) -> None:
    """20 cases of TRL 1.16.0's own loss, in float64: value, reference point and gradient."""
    cases = golden(data_dir)
    assert len(cases) == 20
    for case in cases:
        policy = torch.tensor(case["policy_logps"], dtype=torch.float64, requires_grad=True)
        ratio = policy - torch.tensor(case["reference_logps"], dtype=torch.float64)
        n = len(case["label"])
        labels = torch.tensor([int(x) for x in case["label"]])
        kl_ratio = torch.tensor(case["policy_KL_logps"], dtype=torch.float64) - torch.tensor(
            case["reference_KL_logps"], dtype=torch.float64
        )
        count = torch.tensor(float(len(kl_ratio)), dtype=torch.float64)
        z = (PooledMean(kl_ratio.sum(), count).mean()).clamp(min=0)
        assert z.item() == pytest.approx(case["trl_fp64"]["kl"], abs=1e-5)
        level = Level(case["beta"], case["desirable_weight"], case["undesirable_weight"], 1.0)
        settings = StepKTOSettings(level, Level(1.0, 1.0, 1.0, 0.0))
        batch = Solutions(ratio, torch.arange(n), labels, labels)
        result = step_kto_loss(batch, ReferencePoints(z, torch.zeros(())), settings)
        loss = result.total / result.num_units
        assert loss.item() == pytest.approx(case["trl_fp64"]["loss"], abs=1e-12)
        assert loss.item() == pytest.approx(case["closed_form_loss"], abs=1e-12)
        loss.backward()
        assert policy.grad is not None
        torch.testing.assert_close(
            policy.grad, torch.tensor(case["trl_fp64"]["grad_policy_logps"], dtype=torch.float64), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize(
    ("steps", "outcomes"),
    [
        pytest.param([[(0.2, 1), (0.1, 1)], [(-3.0, 1)]], [1, 1], id="all right"),
        pytest.param([[(0.2, 0), (0.1, 0)], [(-3.0, 0)]], [0, 0], id="all wrong"),
        pytest.param([[(0.2, 1)]], [0], id="a single step, against its outcome"),
        pytest.param([[(0.2, -1), (0.1, -1)]], [-1], id="nothing judged"),
        pytest.param([[(0.0, 1), (5000.0, 0)], [(-5000.0, 1)]], [1, 0], id="extreme log-ratios"),
    ],
)
def test_edge_batches_are_finite_with_right_signs(steps: list, outcomes: list[int]) -> None:
    batch = solutions(steps, outcomes, torch.float32)
    only_steps = StepKTOSettings(Level(1.0, 1.0, 1.0, 0.0), Level(2.0, 1.0, 1.0, 1.0))
    loss = step_kto_loss(batch, points(0.0, 0.0), only_steps).total
    loss.backward()
    grad = batch.step_log_ratio.grad
    assert grad is not None
    assert math.isfinite(loss.item())
    assert torch.isfinite(grad).all()
    for gradient, label, ratio in zip(
        grad.tolist(), batch.step_label.tolist(), batch.step_log_ratio.tolist(), strict=True
    ):
        if label == -1:
            assert gradient == 0
        elif abs(ratio) < 10:  # past that the sigmoid is flat
            assert (gradient < 0) == (label == 1), "a right step's loss falls as it becomes more likely"


def test_a_step_of_no_tokens_has_log_ratio_zero_and_takes_part() -> None:
    batch = solutions([[(0.0, 1)]], [-1])
    assert step_kto_loss(batch, points(0.0, 0.0), SETTINGS).total.item() == pytest.approx(0.6 * 1.5 * 0.5)


def test_empty_micro_batch_contributes_nothing() -> None:
    batch = solutions([], [], torch.float32)
    result = step_kto_loss(batch, points(0.3, 0.1), SETTINGS)
    assert (result.total.item(), result.num_units) == (0.0, 0)


def test_sum_over_micro_batches_is_the_whole() -> None:
    steps = [[(0.3, 1), (-0.2, 0)], [(0.1, 1), (0.4, -1)], [(-0.7, 0)]]
    outcomes, z = [1, 0, 0], points(0.05, 0.02)
    whole = step_kto_loss(solutions(steps, outcomes), z, SETTINGS)
    parts = [step_kto_loss(solutions([s], [c]), z, SETTINGS) for s, c in zip(steps, outcomes, strict=True)]
    assert sum(p.total.item() for p in parts) == pytest.approx(whole.total.item(), rel=1e-12)
    assert sum(p.num_units for p in parts) == whole.num_units


def test_reference_points_pool_before_they_clamp() -> None:
    a = solutions([[(-1.0, 1), (-2.0, 0)]], [1])  # r = -3; steps -1, -2
    b = solutions([[(4.0, 1), (1.0, -1)], [(2.0, 0)], [(0.0, 1)]], [1, 0, 0])  # r = 5, 2, 0; judged steps 4, 2, 0
    (o_a, s_a), (o_b, s_b) = pool_reference(a), pool_reference(b)
    z = clamp_reference(
        PooledMean(o_a.total + o_b.total, o_a.count + o_b.count),
        PooledMean(s_a.total + s_b.total, s_a.count + s_b.count),
    )
    assert z.outcome.item() == pytest.approx((-3 + 5 + 2 + 0) / 4)
    assert z.step.item() == pytest.approx((-1 - 2 + 4 + 2 + 0) / 5)
    below = clamp_reference(o_a, s_a)
    assert (below.outcome.item(), below.step.item()) == (0.0, 0.0)
    nothing = torch.tensor(0.0, dtype=torch.float64)
    empty = clamp_reference(PooledMean(nothing, nothing), PooledMean(nothing, nothing))
    assert (empty.outcome.item(), empty.step.item()) == (0.0, 0.0)


def test_kto_loss_keeps_precision_where_the_sigmoid_saturates() -> None:
    level = Level(1.0, 1.0, 1.0, 1.0)
    loss = kto_loss(torch.tensor([30.0]), torch.tensor([1]), torch.tensor(0.0), level)
    assert loss.item() == pytest.approx(math.exp(-30), rel=1e-6)


def test_dpo_irpo_nll_by_hand() -> None:
    chosen, rejected = torch.tensor([1.0, -0.5]), torch.tensor([0.2, 0.3])
    dpo = -math.log(sigmoid(0.3 * 0.8)) - math.log(sigmoid(0.3 * -0.8))
    assert dpo_loss(chosen, rejected, 0.3).total.item() == pytest.approx(dpo, rel=1e-6)
    irpo = irpo_loss(chosen, rejected, torch.tensor([-6.0, -10.0]), torch.tensor([3.0, 4.0]), 0.3, 0.5)
    assert irpo.total.item() == pytest.approx(dpo + 0.5 * (6 / 3 + 10 / 4), rel=1e-6)
    assert irpo.num_units == 2
    nll: LossSum = nll_loss(torch.tensor([-1.0, -0.25, -2.0]))
    assert (nll.total.item(), nll.num_units) == (3.25, 3)


@pytest.mark.parametrize(
    ("right", "wrong", "expected", "ratio"),
    [
        (10, 10, (1.0, 1.0), 1.0),
        (12, 10, (1.0, 1.0), 1.2),
        (5, 10, (2.0, 1.0), 1.0),
        (40, 10, (1.0, 3.0), 4 / 3),
        (0, 10, (1.0, 1.0), None),
        (10, 0, (1.0, 1.0), None),
    ],
)
def test_balanced_weights(right: float, wrong: float, expected: tuple[float, float], ratio: float | None) -> None:
    """Ratios 1, 1.2 (both inside [1, 4/3]), 0.5 -> 1, 4 -> 4/3."""
    balance = Balance(right, wrong, 1.0, 1.0).balanced()
    assert (balance.desirable_weight, balance.undesirable_weight) == pytest.approx(expected)
    assert balance.ratio == (None if ratio is None else pytest.approx(ratio))


@pytest.mark.parametrize(("reduction", "expected"), [("mean", (2 + 2 / 3, 1 + 1 / 3)), ("sum", (8, 2))])
def test_the_pull_of_a_class_is_the_gradient_of_its_terms(reduction: str, expected: tuple[float, float]) -> None:
    """Solutions of 3 right and an unjudged step, of 3 right steps, of 2 right and a wrong one, of a wrong one.

    At log-ratio and reference point 0 each term has slope beta / 4 times its lambda and its weight in the loss.
    """
    label = torch.tensor([1, 1, 1, -1, 1, 1, 1, 1, 1, 0, 0])
    solution = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3])
    balance = class_balance([(label, step_divisors(label, solution, 4, reduction))], 0.5, 2.0)
    assert (balance.right, balance.wrong) == pytest.approx(expected)
    log_ratio = torch.zeros(11, dtype=torch.float64, requires_grad=True)
    batch = Solutions(log_ratio, solution, label, torch.full((4,), UNJUDGED))
    zero = torch.zeros((), dtype=torch.float64)
    settings = StepKTOSettings(Level(1, 1, 1, 1), Level(0.8, 0.5, 2.0, 1), reduction)
    step_kto_loss(batch, ReferencePoints(zero, zero), settings).total.backward()
    pulls = [-log_ratio.grad[label == 1].sum().item(), log_ratio.grad[label == 0].sum().item()]
    assert pulls == pytest.approx([0.5 * expected[0] * 0.2, 2.0 * expected[1] * 0.2])
    assert balance.ratio == pytest.approx(pulls[0] / pulls[1])

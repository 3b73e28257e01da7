from __future__ import annotations

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import TrainExample
from megatron_stepkto.megatron import patches
from megatron_stepkto.recipe import keys as recipe
from tests.builders import random_examples

patches.install()  # objectives work on micro-batches, which import Megatron

from megatron_stepkto.methods.preference import Preference  # noqa: E402
from megatron_stepkto.methods.registry import make_objective  # noqa: E402
from megatron_stepkto.methods.step_kto import StepKTO  # noqa: E402


def with_outcomes(*outcomes: int | None) -> list[TrainExample]:
    examples = random_examples(len(outcomes))
    return [e.model_copy(update={"outcome": c}) for e, c in zip(examples, outcomes, strict=True)]


def paired(*sides: str) -> list[TrainExample]:
    examples = random_examples(len(sides))
    return [e.model_copy(update={"pair_id": "x", "side": s}) for e, s in zip(examples, sides, strict=True)]


def test_a_data_set_of_another_method_is_refused() -> None:
    with pytest.raises(UserError, match="e1: rft trains on right solutions, this one's outcome is 0"):
        make_objective("rft", recipe.Loss(), with_outcomes(1, 0))
    with pytest.raises(UserError, match="e0: expected a preference pair for dpo"):
        make_objective("dpo", recipe.Loss(), with_outcomes(1, 0))
    with pytest.raises(UserError, match="e0: expected no preference pair for step_kto"):
        make_objective("step_kto", recipe.Loss(), paired("chosen", "rejected"))
    with pytest.raises(UserError, match=r"pair x: expected one chosen and one rejected example, got \['chosen'\]"):
        make_objective("irpo", recipe.Loss(), paired("chosen"))


def test_pairs_are_chosen_then_rejected() -> None:
    rejected, chosen = paired("rejected", "chosen")
    objective = make_objective("dpo", recipe.Loss(dpo_beta=0.2), [rejected, chosen])
    assert isinstance(objective, Preference)
    assert (objective.beta, objective.nll_weight) == (0.2, None)
    assert objective.units([rejected, chosen]) == [[chosen, rejected]]


def test_kto_has_no_step_term_and_auto_balances_each_level() -> None:
    """3 right and 1 wrong outcomes: ratio 3 -> undesirable 3 / (4/3) = 2.25. Steps likewise, by their own counts."""
    examples = with_outcomes(1, 1, 1, 0)
    objective = make_objective("kto", recipe.Loss(balance="auto"), examples)
    assert isinstance(objective, StepKTO)
    assert objective.settings.step.weight == 0
    outcome = objective.settings.outcome
    assert (outcome.desirable_weight, outcome.undesirable_weight) == pytest.approx((1.0, 2.25))
    labels = [s.label for e in examples for s in e.steps]
    right, wrong = labels.count(1), labels.count(0)
    assert right > 4 / 3 * wrong > 0
    assert objective.settings.step.undesirable_weight == pytest.approx(right / wrong / (4 / 3))

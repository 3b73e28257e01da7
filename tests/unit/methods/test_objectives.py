from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.examples import Examples
from megatron_stepkto.base.records import TrainExample, TrainStep
from megatron_stepkto.losses import Balance, Level
from megatron_stepkto.megatron import patches
from megatron_stepkto.methods.metrics import balance_note, balance_text
from megatron_stepkto.recipe import keys as recipe
from tests.builders import random_examples

patches.install()  # objectives work on micro-batches, which import Megatron

from megatron_stepkto.methods.dpo import PairObjective  # noqa: E402
from megatron_stepkto.methods.registry import METHODS  # noqa: E402
from megatron_stepkto.methods.step_kto import StepKTOObjective  # noqa: E402


def with_outcomes(*outcomes: int | None) -> list[TrainExample]:
    examples = random_examples(len(outcomes))
    return [e.model_copy(update={"outcome": c}) for e, c in zip(examples, outcomes, strict=True)]


def paired(*sides: str) -> list[TrainExample]:
    examples = random_examples(len(sides))
    return [e.model_copy(update={"pair_id": "x", "side": s}) for e, s in zip(examples, sides, strict=True)]


def objective_of(method: str, loss: recipe.Loss, examples: list[TrainExample]) -> Any:
    """Of examples that each train once."""
    return METHODS[method].objective(loss, Examples.of(examples), np.arange(len(examples)))


def test_a_data_set_of_another_method_is_refused() -> None:
    with pytest.raises(UserError, match="e1: rft trains on right solutions, this one's outcome is 0"):
        METHODS["rft"].units(Examples.of(with_outcomes(1, 0)))
    with pytest.raises(UserError, match="e0: expected a preference pair for dpo"):
        METHODS["dpo"].units(Examples.of(with_outcomes(1, 0)))
    with pytest.raises(UserError, match="e0: expected no preference pair for step_kto"):
        METHODS["step_kto"].units(Examples.of(paired("chosen", "rejected")))
    with pytest.raises(UserError, match=r"pair x: expected one chosen and one rejected example, got \['chosen'\]"):
        METHODS["irpo"].units(Examples.of(paired("chosen")))


def test_pairs_are_chosen_then_rejected() -> None:
    examples = paired("rejected", "chosen")
    objective = objective_of("dpo", recipe.Loss(dpo_beta=0.2), examples)
    assert isinstance(objective, PairObjective)
    assert (objective.beta, objective.nll_weight) == (0.2, None)
    assert METHODS["dpo"].units(Examples.of(examples)).tolist() == [[1, 0]]
    two = [e.model_copy(update={"pair_id": "y", "example_id": f"y{e.side}"}) for e in examples]
    mixed = Examples.of([two[0], *examples, two[1]])
    assert METHODS["dpo"].units(mixed).tolist() == [[3, 0], [2, 1]], "pairs in the order in which they begin"


def test_kto_has_no_step_term_and_auto_balances_outcomes() -> None:
    """3 right and 1 wrong outcomes, one undecided: ratio 3 -> undesirable 3 / (4/3) = 2.25."""
    objective = objective_of("kto", recipe.Loss(balance="auto"), with_outcomes(1, 1, 1, 0, None))
    assert isinstance(objective, StepKTOObjective)
    assert objective.settings.step.weight == 0
    assert objective.balance == {"outcome": Balance(3, 1, 1.0, 2.25)}
    assert objective.settings.outcome == Level(0.1, 1.0, 2.25, 1.0)


def labelled(*solutions: list[int | None]) -> list[TrainExample]:
    """One solution per list of its steps' labels; the first is right, the others are wrong."""
    return [
        TrainExample(
            example_id=f"e{number}",
            problem_id="p",
            prompt_token_ids=[1],
            token_ids=[5] * len(labels),
            steps=[TrainStep(token_start=i, token_end=i + 1, label=label) for i, label in enumerate(labels)],
            outcome=int(number == 0),
        )
        for number, labels in enumerate(solutions)
    ]


# Right solutions are long and all right; wrong ones stop soon, most steps wrong.
MIX = labelled([1] * 8 + [None], [1, 0], [0], [0, None], [None])


@pytest.mark.parametrize(
    ("reduction", "right", "wrong", "weights"),
    [
        # 8/8 + 1/2 = 1.5 right, 1/2 + 1 + 1 = 2.5 wrong: desirable 2.5 / 1.5
        ("mean", 1.5, 2.5, (5 / 3, 1.0)),
        # 9 right, 3 wrong steps: undesirable 3 / (4/3). By these weights the mean's ratio would be 1.5 / 5.625 = 0.27.
        ("sum", 9, 3, (1.0, 2.25)),
    ],
)
def test_auto_balances_the_weights_with_which_steps_enter_the_loss(
    reduction: Any, right: float, wrong: float, weights: tuple[float, float]
) -> None:
    objective = objective_of("step_kto", recipe.Loss(balance="auto", step_reduction=reduction), MIX)
    assert isinstance(objective, StepKTOObjective)
    step = objective.settings.step
    assert (step.desirable_weight, step.undesirable_weight) == pytest.approx(weights)
    balance = objective.balance["step"]
    assert (balance.right, balance.wrong) == pytest.approx((right, wrong))
    assert 1 - 1e-12 <= balance.ratio <= 4 / 3 + 1e-12
    assert objective.balance["outcome"] == Balance(1, 4, 4.0, 1.0)


def test_fixed_weights_stay_and_their_ratio_is_known() -> None:
    objective = objective_of("step_kto", recipe.Loss(undesirable_weight_step=0.5, outcome_weight=0), MIX)
    assert objective.balance == {"step": Balance(1.5, 2.5, 1.0, 0.5)}
    assert objective.balance["step"].ratio == pytest.approx(1.5 / 1.25)


@pytest.mark.parametrize(
    ("method", "changes", "examples", "message"),
    [
        ("kto", {}, labelled([1, 0]), "nothing is wrong: the weights in the loss add up to 1 right and 0 wrong"),
        ("step_kto", {"step_weight": 0}, labelled([1, 0]), "nothing is wrong: .* 1 right and 0 wrong"),
        ("step_kto", {"outcome_weight": 0}, MIX[2:4], "nothing is right: .* 0 right and 2 wrong"),
    ],
)
def test_a_loss_that_reads_one_class_is_refused(
    method: Any, changes: dict[str, Any], examples: list[TrainExample], message: str
) -> None:
    with pytest.raises(UserError, match=f"train: {method} learns from right against wrong, and {message}"):
        objective_of(method, recipe.Loss(**changes), examples)


def test_the_balance_in_words() -> None:
    note = balance_note({"outcome": Balance(3, 1, 1.0, 2.25), "step": Balance(1 / 3, 0, 1.0, 0.5)})
    assert note["outcome"] == {
        "right": 3.0, "wrong": 1.0, "desirable_weight": 1.0, "undesirable_weight": 2.25, "ratio": 1.333,
    }  # fmt: skip
    assert balance_text(note) == (
        "pull of right over wrong: outcomes 1.333 (right 3 x 1, wrong 1 x 2.25); "
        "steps none (right 0.3333 x 1, wrong 0 x 0.5)"
    )

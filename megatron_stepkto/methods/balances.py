"""Labels and lambdas of losses over single solutions, right against wrong, and their balance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_stepkto.base.records import TrainExample
from megatron_stepkto.judging.classes import check_both_classes
from megatron_stepkto.losses import UNJUDGED, Balance, class_balance, step_divisors
from megatron_stepkto.recipe import keys as recipe


def labels_of(values: Iterable[int | None]) -> Tensor:
    """[n] int64: RIGHT, WRONG, or UNJUDGED for None."""
    return torch.tensor([UNJUDGED if value is None else value for value in values], dtype=torch.int64)


def outcome_balance(loss: recipe.Loss, examples: Sequence[TrainExample]) -> Balance:
    """Of outcomes, with the lambdas of the recipe, or those that balance them."""
    balance = class_balance(
        labels_of(example.outcome for example in examples),
        torch.ones(len(examples), dtype=torch.float64),
        loss.desirable_weight_outcome,
        loss.undesirable_weight_outcome,
    )
    return balance.balanced() if loss.balance == "auto" else balance


def step_balance(loss: recipe.Loss, examples: Sequence[TrainExample]) -> Balance:
    """Of steps, as ``outcome_balance``."""
    label = labels_of(step.label for example in examples for step in example.steps)
    solution = torch.repeat_interleave(torch.tensor([len(example.steps) for example in examples], dtype=torch.int64))
    divisors = step_divisors(label, solution, len(examples), loss.step_reduction)
    balance = class_balance(label, divisors, loss.desirable_weight_step, loss.undesirable_weight_step)
    return balance.balanced() if loss.balance == "auto" else balance


def check_classes(method: str, balance: Mapping[str, Balance]) -> None:
    """Raises UserError when the loss reads one class only: of a data set that had both, max_updates may leave one."""
    right, wrong = (sum(getattr(each, name) for each in balance.values()) for name in ("right", "wrong"))
    had = f"the weights in the loss add up to {right:g} right and {wrong:g} wrong over what max_updates and epochs use"
    check_both_classes("train", method, right, wrong, had)

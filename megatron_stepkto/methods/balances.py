"""Labels and lambdas of losses over single solutions, right against wrong, and their balance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megatron_stepkto.base.examples import Examples, Indices
from megatron_stepkto.judging.classes import check_both_classes
from megatron_stepkto.losses import Balance, class_balance, step_divisors
from megatron_stepkto.recipe import keys as recipe

BLOCK = 8192  # examples whose steps are in memory together


def outcome_balance(loss: recipe.Loss, examples: Examples, used: Indices) -> Balance:
    """Of outcomes, with the lambdas of the recipe, or those that balance them.

    Args:
        used: indices of the examples, as often as they train.
    """
    label = torch.from_numpy(examples.outcomes()[used])
    terms = [(label, torch.ones(len(used), dtype=torch.float64))]
    balance = class_balance(terms, loss.desirable_weight_outcome, loss.undesirable_weight_outcome)
    return balance.balanced() if loss.balance == "auto" else balance


def step_balance(loss: recipe.Loss, examples: Examples, used: Indices) -> Balance:
    """Of steps, as ``outcome_balance``."""
    rows = examples.sample[used]

    def terms() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            label = torch.from_numpy(examples.step_labels(block))
            solution = torch.repeat_interleave(torch.from_numpy(examples.num_steps[block]))
            yield label, step_divisors(label, solution, len(block), loss.step_reduction)

    balance = class_balance(terms(), loss.desirable_weight_step, loss.undesirable_weight_step)
    return balance.balanced() if loss.balance == "auto" else balance


def check_classes(method: str, balance: Mapping[str, Balance]) -> None:
    """Raises UserError when the loss reads one class only: of a data set that had both, max_updates may leave one."""
    right, wrong = (sum(getattr(each, name) for each in balance.values()) for name in ("right", "wrong"))
    had = f"the weights in the loss add up to {right:g} right and {wrong:g} wrong over what max_updates and epochs use"
    check_both_classes("train", method, right, wrong, had)

"""From a recipe's method to a loss over micro-batches: the bridge between losses.py and the loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import TrainExample
from megatron_stepkto.judging.classes import check_both_classes
from megatron_stepkto.losses import UNJUDGED, Balance, Level, Solutions, StepKTOSettings, class_balance, step_divisors
from megatron_stepkto.megatron.batch import Document
from megatron_stepkto.methods.objective import Objective
from megatron_stepkto.methods.preference import Preference
from megatron_stepkto.methods.rft import Supervised
from megatron_stepkto.methods.step_kto import StepKTO
from megatron_stepkto.recipe import keys as recipe


def solutions_of_documents(
    documents: Sequence[Document], log_probs: Mapping[str, Tensor], references: Mapping[str, Tensor]
) -> Solutions:
    """Log-ratios and labels of scored documents; both mappings hold [S] float64 of a document's steps by its key."""
    return Solutions(
        torch.cat([log_probs[d.key] - references[d.key] for d in documents]),
        torch.repeat_interleave(torch.tensor([len(d.steps) for d in documents], dtype=torch.int64)),
        _labels(step.label for d in documents for step in d.steps),
        _labels(d.outcome for d in documents),
    )


def _labels(values: Iterable[int | None]) -> Tensor:
    return torch.tensor([UNJUDGED if value is None else value for value in values], dtype=torch.int64)


def make_objective(method: recipe.Method, loss: recipe.Loss, examples: Sequence[TrainExample]) -> Objective:
    """The objective of a recipe.

    Args:
        examples: those that train, on all ranks; ``balance: auto`` weighs their classes.

    Raises:
        UserError: Step-KTO or KTO would read right or wrong labels alone.
    """
    if method == "rft":
        return Supervised()
    if method in ("dpo", "irpo"):
        return Preference(loss.dpo_beta, loss.nll_weight if method == "irpo" else None)
    outcome, step = _balances(loss, examples)
    settings = StepKTOSettings(
        Level(loss.beta_outcome, outcome.desirable_weight, outcome.undesirable_weight, loss.outcome_weight),
        Level(
            loss.beta_step, step.desirable_weight, step.undesirable_weight, 0.0 if method == "kto" else loss.step_weight
        ),
        loss.step_reduction,
    )
    balance = {
        name: balance
        for name, balance, level in (("outcome", outcome, settings.outcome), ("step", step, settings.step))
        if level.weight
    }
    _check_classes(method, balance)
    return StepKTO(settings, uses_kl=loss.reference_point == "mismatched", balance=balance)


def _balances(loss: recipe.Loss, examples: Sequence[TrainExample]) -> tuple[Balance, Balance]:
    """Of outcomes and of steps, with the lambdas of the recipe, or those that balance them."""
    outcome_label = _labels(example.outcome for example in examples)
    step_label = _labels(step.label for example in examples for step in example.steps)
    solution = torch.repeat_interleave(torch.tensor([len(example.steps) for example in examples], dtype=torch.int64))
    divisors = step_divisors(step_label, solution, len(examples), loss.step_reduction)
    outcome = class_balance(
        outcome_label,
        torch.ones(len(examples), dtype=torch.float64),
        loss.desirable_weight_outcome,
        loss.undesirable_weight_outcome,
    )
    step = class_balance(step_label, divisors, loss.desirable_weight_step, loss.undesirable_weight_step)
    return (outcome.balanced(), step.balanced()) if loss.balance == "auto" else (outcome, step)


def _check_classes(method: recipe.Method, balance: Mapping[str, Balance]) -> None:
    """Raises UserError when the loss reads one class only: of a data set that had both, max_updates may leave one."""
    right, wrong = (sum(getattr(each, name) for each in balance.values()) for name in ("right", "wrong"))
    had = f"the weights in the loss add up to {right:g} right and {wrong:g} wrong over what max_updates and epochs use"
    check_both_classes("train", method, right, wrong, had)


def units_of(method: recipe.Method, examples: Sequence[TrainExample]) -> list[list[TrainExample]]:
    """Examples grouped into what must stay together: (chosen, rejected) of a pair, or one alone.

    Raises:
        UserError: the examples were made for another method.
    """
    _check_role(method, examples)
    if method not in ("dpo", "irpo"):
        return [[example] for example in examples]
    pairs: dict[str, dict[str, TrainExample]] = {}
    for example in examples:
        pairs.setdefault(example.pair_id or "", {})[example.side or ""] = example
    return [[pair["chosen"], pair["rejected"]] for pair in pairs.values()]


def _check_role(method: recipe.Method, examples: Sequence[TrainExample]) -> None:
    """Raises UserError for a data set that was built for another method: it would train silently, and wrongly."""
    fix = f"build it again: `stepkto dataset` with train.method: {method}"
    sides: dict[str | None, list[str | None]] = {}
    for example in examples:
        if method == "rft" and example.outcome != 1:
            raise UserError(f"{example.example_id}: rft trains on right solutions, this one's outcome is "
                            f"{example.outcome}; {fix}")  # fmt: skip
        if (example.pair_id is not None) != (method in ("dpo", "irpo")):
            wanted = "a" if example.pair_id is None else "no"
            raise UserError(f"{example.example_id}: expected {wanted} preference pair for {method}; {fix}")
        sides.setdefault(example.pair_id, []).append(example.side)
    for pair, members in sides.items():
        if pair is not None and sorted(map(str, members)) != ["chosen", "rejected"]:
            raise UserError(f"pair {pair}: expected one chosen and one rejected example, got {members}; {fix}")

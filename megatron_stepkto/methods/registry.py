"""From a recipe's method to a loss over micro-batches: the bridge between losses.py and the loop."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import TrainExample
from megatron_stepkto.losses import Level, StepKTOSettings, balanced_weights
from megatron_stepkto.methods.objective import Objective
from megatron_stepkto.methods.preference import Preference
from megatron_stepkto.methods.rft import Supervised
from megatron_stepkto.methods.step_kto import StepKTO
from megatron_stepkto.recipe import keys as recipe


def make_objective(method: recipe.Method, loss: recipe.Loss, examples: Sequence[TrainExample]) -> Objective:
    """The objective of a recipe; ``examples`` are those of all ranks (``balance: auto`` counts their classes)."""
    _check_role(method, examples)
    if method == "rft":
        return Supervised()
    if method in ("dpo", "irpo"):
        return Preference(loss.dpo_beta, loss.nll_weight if method == "irpo" else None)
    outcome = (loss.desirable_weight_outcome, loss.undesirable_weight_outcome)
    step = (loss.desirable_weight_step, loss.undesirable_weight_step)
    if loss.balance == "auto":
        outcomes = [example.outcome for example in examples]
        steps = [s.label for example in examples for s in example.steps]
        outcome = balanced_weights(outcomes.count(1), outcomes.count(0), *outcome)
        step = balanced_weights(steps.count(1), steps.count(0), *step)
    settings = StepKTOSettings(
        Level(loss.beta_outcome, *outcome, loss.outcome_weight),
        Level(loss.beta_step, *step, 0.0 if method == "kto" else loss.step_weight),
        loss.step_reduction,
    )
    return StepKTO(settings, uses_kl=loss.reference_point == "mismatched")


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

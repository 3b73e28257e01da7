"""The settings that determine the outputs of training and data set stages, for each method."""

from __future__ import annotations

from typing import Any

from megatron_stepkto.recipe import keys as recipes

# Keys that only some methods read: changing another method's does not make a finished stage stale.
_LOSS_KEYS: dict[str, set[str]] = {"rft": set(), "dpo": {"dpo_beta"}, "irpo": {"dpo_beta", "nll_weight"}}
_DATASET_KEYS: dict[str, set[str]] = {
    "rft": {"max_tokens", "max_examples_per_problem", "right_solutions"},
    "dpo": {"max_tokens", "pairs_per_problem", "right_solutions"},
    "irpo": {"max_tokens", "pairs_per_problem", "right_solutions"},
}


def training_key(settings: recipes.Training) -> dict[str, Any]:
    """The settings that determine the trained weights, up to rounding: a run may resume at another layout."""
    key = recipes.deciding(settings)
    # its checkpoints hold the optimizer's state in another form: neither kind resumes from the other's
    key["distributed_optimizer"] = settings.parallel.distributed_optimizer
    unread = {"dpo_beta", "nll_weight"}
    used = _LOSS_KEYS.get(settings.method, set(key["loss"]) - unread)
    key["loss"] = {name: value for name, value in key["loss"].items() if name in used}
    return key


def dataset_key(settings: recipes.Dataset, method: recipes.Method) -> dict[str, Any]:
    """The settings of the section dataset that determine the examples of a method."""
    key = recipes.deciding(settings)
    used = _DATASET_KEYS.get(method, set(key) - {"pairs_per_problem", "right_solutions"})
    return {name: value for name, value in key.items() if name in used}

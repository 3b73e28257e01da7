"""The settings that determine the outputs of training and data set stages, for each method."""

from __future__ import annotations

from typing import Any

from megatron_stepkto.methods.registry import method_of
from megatron_stepkto.recipe import keys as recipes


def training_key(settings: recipes.Training) -> dict[str, Any]:
    """The settings that determine the trained weights, up to rounding: a run may resume at another layout."""
    key = recipes.deciding(settings)
    if settings.lora:
        del key["lora"]["start"]  # an input of the stage: its content counts
    # its checkpoints hold the optimizer's state in another form: neither kind resumes from the other's
    key["distributed_optimizer"] = settings.parallel.distributed_optimizer
    used = method_of(settings.method).loss_keys  # changing another method's does not make a finished stage stale
    key["loss"] = {name: value for name, value in key["loss"].items() if name in used}
    return key


def dataset_key(settings: recipes.Dataset, method: recipes.Method) -> dict[str, Any]:
    """The settings of the section dataset that determine the examples of a method."""
    key = recipes.deciding(settings)
    del key["exclude"]  # an input of the stage: its content counts
    used = method_of(method).dataset_keys
    return {name: value for name, value in key.items() if name in used}

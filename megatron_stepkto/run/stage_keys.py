"""What of a recipe's sections decides a stage's outputs: a change of anything else leaves what is finished as it is."""

from __future__ import annotations

from typing import Any

from megatron_stepkto.methods.registry import method_of
from megatron_stepkto.recipe import keys as recipes

_NOT_DECIDING = {"parallel", "device", "micro_batch_tokens", "pad_documents_to", "recompute", "timeout_s", "max_gap",
                 "checkpoint_every", "keep_checkpoints", "async_checkpoints", "log"}  # fmt: skip


def training_key(settings: recipes.Training) -> dict[str, Any]:
    """What of a training's settings decides its weights, but for rounding: a run may go on at another layout."""
    key = settings.model_dump(mode="json", exclude=_NOT_DECIDING)
    # its checkpoints hold the optimizer's state in another form: neither kind goes on from the other's
    key["distributed_optimizer"] = settings.parallel.distributed_optimizer
    used = method_of(settings.method).loss_keys  # changing another method's does not make a finished stage stale
    key["loss"] = {name: value for name, value in key["loss"].items() if name in used}
    return key


def dataset_key(settings: recipes.Dataset, method: recipes.Method) -> dict[str, Any]:
    """What of the dataset section decides the examples of a method."""
    key = settings.model_dump(mode="json")
    used = method_of(method).dataset_keys
    return {name: value for name, value in key.items() if name in used}

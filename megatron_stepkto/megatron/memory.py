"""The recipe's keys that save memory, and those that overlap messages with computation, as fields of megatron-core.

megatron-core ignores some of them without a word where they mean nothing; ``acceleration.choose`` refuses those.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_stepkto.architectures.model_config import ModelConfig
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.megatron.acceleration import Acceleration
from megatron_stepkto.recipe.keys import Recompute, Training


def check_norms(config: ModelConfig, settings: Training, acceleration: Acceleration) -> None:
    """Refuse to recompute norms that are a part of Transformer Engine's linear layers: megatron-core would not.

    Raises:
        UserError: names the key.
    """
    if acceleration.transformer_engine and config.experts is None and settings.recomputes("layernorm"):
        raise UserError(
            "train.recompute.modules names layernorm, but the norms of a dense model are inside Transformer Engine's "
            "linear layers, where megatron-core does not compute them again; leave it out, or set "
            "train.transformer_engine: off"
        )


def activation_fields(recompute: bool | Recompute, offload_layers: int) -> dict[str, Any]:
    """Of megatron-core's TransformerConfig."""
    if offload_layers:
        return {"cpu_offloading": True, "cpu_offloading_num_layers": offload_layers}
    if not recompute:
        return {}
    chosen = Recompute(every=1) if recompute is True else recompute
    if chosen.modules:
        return {"recompute_granularity": "selective", "recompute_modules": list(chosen.modules)}
    return {
        "recompute_granularity": "full",
        "recompute_method": "block" if chosen.layers else "uniform",
        "recompute_num_layers": chosen.layers or chosen.every,
    }


def optimizer_fields(settings: Training) -> dict[str, Any]:
    """Of megatron-core's OptimizerConfig."""
    optimizer, moments = settings.optimizer, _dtype(settings.optimizer.moment_dtype)
    fields: dict[str, Any] = {"overlap_param_gather": _overlaps_gather(settings)}
    if not (optimizer.offload or moments != torch.float32):
        return fields
    fields |= {
        # Offload takes this code path too: the weights are given to AdamW as they are, and it holds the main weights.
        "use_precision_aware_optimizer": True,
        "main_grads_dtype": _dtype(optimizer.gradient_dtype),
        "exp_avg_dtype": moments,
        "exp_avg_sq_dtype": moments,
    }
    if optimizer.offload:
        fields |= {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": optimizer.offload,
            # one host optimizer per weight, so that it updates while gradients of the next are copied
            "overlap_cpu_optimizer_d2h_h2d": True,
        }
    return fields


def data_parallel_fields(settings: Training) -> dict[str, Any]:
    """Of megatron-core's DistributedDataParallelConfig."""
    return {
        "grad_reduce_in_fp32": settings.optimizer.gradient_dtype == "float32",
        "overlap_grad_reduce": settings.parallel.overlap,
        "overlap_param_gather": _overlaps_gather(settings),
        # a bucket that has arrived does not begin to gather the next one: Engine begins with all
        "align_param_gather": True,
    }


def _overlaps_gather(settings: Training) -> bool:
    """FP8 weights need work after they are gathered, which megatron-core does not do where it must not overlap."""
    fp8_weights = settings.fp8 is not None and settings.fp8.weights
    return settings.parallel.overlap and settings.parallel.distributed_optimizer and not fp8_weights


def _dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]

"""The recipe's keys that save memory, and those that overlap messages with computation, as fields of megatron-core.

megatron-core ignores some of them without a word where they mean nothing; ``acceleration.choose`` refuses those.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_stepkto.recipe.keys import Optimizer, Parallel, Recompute


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


def optimizer_fields(optimizer: Optimizer) -> dict[str, Any]:
    """Of megatron-core's OptimizerConfig."""
    moments = _dtype(optimizer.moment_dtype)
    if not (optimizer.offload or moments != torch.float32):
        return {}
    fields: dict[str, Any] = {
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


def data_parallel_fields(optimizer: Optimizer, parallel: Parallel) -> dict[str, Any]:
    """Of megatron-core's DistributedDataParallelConfig."""
    return {
        "grad_reduce_in_fp32": optimizer.gradient_dtype == "float32",
        "overlap_grad_reduce": parallel.overlap,
        "overlap_param_gather": parallel.overlap and parallel.distributed_optimizer,
    }


def _dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]

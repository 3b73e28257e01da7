"""The distributed optimizer's fp32 main weights as whole tensors, for checkpoints of a model with FP8 weights.

FP8 rounds a weight far more coarsely than bf16. So such a run loads main weights from the checkpoint itself, not from
the model's copies, and saves main weights rounded to bf16, not the model's dequantised copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn


def optimizer_parts(optimizer: Any) -> Sequence[Any]:
    """The optimizers that Megatron chains, one for weights of experts and one for the others; or the only one."""
    parts: Sequence[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    return parts


def load_main_weights(optimizer: Any, model: nn.Module, loaded: Mapping[str, Tensor]) -> None:
    """Set this rank's parts of the main weights from whole tensors, by the names of ``model``'s parameters."""
    weight: Any  # Megatron sets main_param on it
    for name, weight in model.named_parameters():
        if (part := _owner(optimizer, weight)) is not None:
            span = part._get_model_param_range_map(weight)["param"]
            with torch.no_grad():
                weight.main_param.copy_(loaded[name].reshape(-1)[span.start : span.end])


def whole_main_weights(optimizer: Any, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Each weight of ``model`` from its main weight, rounded to ``dtype``: the same on every data-parallel rank.

    Collective over the data-parallel ranks (with context): each contributes its part, and zeros elsewhere.
    """
    found = {}
    weight: Any
    for name, weight in model.named_parameters():
        whole = torch.zeros(weight.numel(), dtype=dtype, device=weight.device)
        if (part := _owner(optimizer, weight)) is not None:
            span = part._get_model_param_range_map(weight)["param"]
            whole[span.start : span.end] = weight.main_param.detach()
        # Megatron marks weights of experts that are spread over expert-parallel ranks: others share their gradients.
        is_expert = not getattr(weight, "allreduce", True)
        group = (
            parallel_state.get_expert_data_parallel_group()
            if is_expert
            else parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
        dist.all_reduce(whole, group=group)
        found[name] = whole.view(weight.shape)
    return found


def _owner(optimizer: Any, weight: nn.Parameter) -> Any | None:
    """The optimizer that holds a part of this weight on this rank."""
    return next((part for part in optimizer_parts(optimizer) if weight in part.model_param_gbuf_map), None)

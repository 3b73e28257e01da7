"""How evenly a router spreads tokens over the experts, counted in training's own forward passes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_stepkto.megatron.batch import MicroBatch
from megatron_stepkto.megatron.context_parallel import held_positions


class ExpertLoad:
    """Tokens that each layer sends to each of its experts, without padding: ``counts`` [layers, experts] int64 of this
    rank's tokens and layers.

    Only passes inside ``counting`` count. Layers that are computed again in the backward pass are outside of it.
    """

    def __init__(self, num_layers: int, num_experts: int, policies: Sequence[Any], device: torch.device) -> None:
        self.counts = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        self._real: Tensor | None = None  # [t] bool: this rank's tokens that are not padding
        for policy in policies:
            for layer in policy.decoder.layers:
                layer.mlp.router.register_forward_hook(functools.partial(self._count, layer.layer_number - 1))

    def _count(self, layer: int, _router: Any, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        if self._real is not None:
            self.counts[layer] += (output[1] & self._real[:, None]).sum(0)  # [t, experts] bool

    @contextlib.contextmanager
    def counting(self, batch: MicroBatch, *, sequence: bool) -> Iterator[None]:
        """Count the forward pass of a whole micro-batch, of which this rank may hold a part.

        Args:
            sequence: whether tensor-parallel ranks hold a part of the tokens each.
        """
        self._real = _real_tokens(batch, sequence=sequence).to(self.counts.device)
        try:
            yield
        finally:
            self._real = None

    def take(self) -> dict[str, float]:
        """The metrics of all counts since the last call, over all ranks. Collective.

        Every token of a layer is on one rank: tensor-parallel ranks of a mixture share the tokens out.
        """
        counts = self.counts.clone()
        self.counts.zero_()
        dist.all_reduce(counts)
        return load_metrics(counts.cpu())


def load_metrics(counts: Tensor) -> dict[str, float]:
    """Metrics of [layers, experts] tokens.

    expert_load: tokens of a layer's busiest expert over the mean of its experts, mean over layers; 1 is even, and the
    number of experts over those per token is the most. expert_load_worst: that of the layer where it is largest.
    experts_unused: share of all layers' experts that got no token.
    """
    busiest = counts.amax(1).double() / counts.double().mean(1).clamp(min=torch.finfo(torch.float64).tiny)
    return {
        "expert_load": busiest.mean().item(),
        "expert_load_worst": busiest.max().item(),
        "experts_unused": (counts == 0).double().mean().item(),
    }


def _real_tokens(batch: MicroBatch, *, sequence: bool) -> Tensor:
    """[t] bool, on the CPU."""
    bounds = batch.packed.bounds
    real = torch.zeros(bounds[-1], dtype=torch.bool, device="cpu")
    for (start, _), document in zip(pairwise(bounds), batch.documents, strict=False):  # the last may be padding
        real[start : start + len(document)] = True
    if (ranks := parallel_state.get_context_parallel_world_size()) > 1:
        real = real[held_positions(bounds, parallel_state.get_context_parallel_rank(), ranks)]
    if sequence:
        parts = real.chunk(parallel_state.get_tensor_model_parallel_world_size())
        real = parts[parallel_state.get_tensor_model_parallel_rank()]
    return real

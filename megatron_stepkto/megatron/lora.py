"""Low-rank adapters (LoRA, arXiv 2106.09685) on Megatron-Core's linear layers: y = W x + alpha / rank * B A x.

W stays as it is: it has no gradient, no gradient buffer and no optimizer state. With ``t`` tokens, T tensor-parallel
ranks and rank r, an adapter's parts and messages are:

- ColumnParallelLinear (W's rows are split): A [r, in] is whole on every rank, B [out / T, r] is split like W. A x is
  [t, r] and the same on all ranks; the backward pass sums its gradient over them, as each has other rows of B. Under
  sequence parallelism a rank computes A x of its own tokens, and the ranks gather [t, r] (not [t, in]).
- RowParallelLinear (W's columns are split): A [r, in / T] is split like W, the ranks sum [t, r], and B [out, r] is
  whole on every rank. Under sequence parallelism the sum is a reduce-scatter over tokens.

A matrix that is whole on every rank but sees a part of the tokens has the mark ``sequence_parallel``: Megatron sums its
gradient over the tensor-parallel ranks.

An expert's matrices may be split over the T ranks of expert tensor parallelism. Megatron gathers their tokens before
the expert and sums the ranks' outputs after it, and in the backward pass the gradients before it. So A x and the
adapter's output stay parts, like the layer's own; only the matrix that is whole on every rank has its gradient summed.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn.functional import linear as product
from torch.nn.functional import rms_norm

from megatron_stepkto.architectures.adapters import ADAPTER, AdaptedLinear
from megatron_stepkto.architectures.mapping import LAYERS
from megatron_stepkto.base.files import stable_hash
from megatron_stepkto.recipe.keys import LoRA

_EXPERT = re.compile(r"local_experts\.(\d+)")
_GROUPED = ("mlp.experts.linear_", "mlp.experts.experts.linear_")  # of a module, and in a checkpoint
# (name of the Hugging Face matrix, its rows and columns, rank) -> whole A [rank, columns] and B [rows, rank]
Factors = Callable[[str, tuple[int, int], int], tuple[Tensor, Tensor]]


class _Pair(nn.Module):
    """This rank's part of one Hugging Face matrix's adapter. a: [rank, in], b: [out, rank]."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Both. Called, not read: Megatron waits for weights that are being gathered before a module runs."""
        return self.a, self.b


class Adapter(nn.Module):
    """The adapters of one linear layer, a child for each Hugging Face matrix; ``enabled`` False: the layer as it was.

    Args:
        weight: the layer's, which says where and in which precision the adapter lives.
        what: which matrices the layer holds. index: the layer's number in the whole model, and its expert's.
        sequence: whether sequence parallelism is on.
    """

    def __init__(
        self, weight: Tensor, what: AdaptedLinear, index: tuple[int, ...], lora: LoRA, *, sequence: bool
    ) -> None:
        super().__init__()
        self.what, self.index, self.lora = what, index, lora
        self.enabled = True
        self._group = (
            parallel_state.get_expert_tensor_parallel_group()
            if what.of_expert
            else parallel_state.get_tensor_model_parallel_group()
        )
        self._sequence = sequence and not what.of_expert
        for matrix in what.matrices:
            rows, columns = what.hf_shape(matrix)
            rows, columns = (rows, columns // self._ranks) if what.splits_input else (rows // self._ranks, columns)
            make = functools.partial(torch.empty, dtype=weight.dtype, device=weight.device)
            pair = _Pair(make(lora.rank, columns), make(rows, lora.rank))
            split, whole = (pair.a, pair.b) if what.splits_input else (pair.b, pair.a)
            set_tensor_model_parallel_attributes(split, True, 1 if what.splits_input else 0, 1)
            whole.sequence_parallel = self._sequence  # type: ignore[attr-defined]
            if what.of_expert:  # the gradient norm counts it on the first of the ranks that share the expert
                set_tensor_model_parallel_attributes(whole, True, 0, 1)
                whole.shared = self._group.rank() > 0  # type: ignore[attr-defined]
            for factor in (pair.a, pair.b):  # an expert's gradients are summed over other ranks, like its weight's
                factor.allreduce = getattr(weight, "allreduce", True)  # type: ignore[attr-defined]
            self.add_module(matrix.target, pair)

    @property
    def _ranks(self) -> int:
        return int(self._group.size())

    @property
    def _pairs(self) -> list[_Pair]:
        return [self.get_submodule(matrix.target) for matrix in self.what.matrices]  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """What the adapters add to the layer's output. x: [t, 1, in] (an expert's: [t, in]), its own input."""
        factors: list[tuple[Tensor, Tensor]] = [pair() for pair in self._pairs]
        if self.what.of_expert and self._ranks > 1:
            split_a = self.what.splits_input
            factors = [(a, self._sum_grad(b)) if split_a else (self._sum_grad(a), b) for a, b in factors]
        a = factors[0][0] if len(factors) == 1 else torch.cat([a for a, _ in factors])
        low = product(x, a) * (self.lora.alpha / self.lora.rank)  # [.., number of adapters * rank]
        if self.what.splits_input:
            reduce = reduce_scatter_to_sequence_parallel_region if self._sequence else _reduce
            low = low if self.what.of_expert else reduce(low)
        elif not self.what.of_expert:
            low = _gather(low) if self._sequence else copy_to_tensor_model_parallel_region(low)
        times, sizes = self.what.pattern(self._ranks)
        if len(sizes) == 1:
            return product(low, factors[0][1])
        parts = [low.new_zeros(()).expand(*low.shape[:-1], times, size) for size in sizes]
        for matrix, (_, b), own in zip(self.what.matrices, factors, low.split(self.lora.rank, dim=-1), strict=True):
            parts[matrix.part] = product(own, b).unflatten(-1, (times, sizes[matrix.part]))
        return torch.cat(parts, dim=-1).flatten(-2)

    def _sum_grad(self, whole: Tensor) -> Tensor:
        copied: Tensor = copy_to_tensor_model_parallel_region(whole, self._group)
        return copied

    def fill(self, factors: Factors) -> None:
        """Set this rank's parts from whole matrices."""
        rank = self._group.rank()
        for matrix, pair in zip(self.what.matrices, self._pairs, strict=True):
            a, b = factors(self.what.hf_name(matrix, self.index), self.what.hf_shape(matrix), self.lora.rank)
            if self.what.splits_input:
                a = a.chunk(self._ranks, dim=1)[rank]
            with torch.no_grad():
                pair.a.copy_(a)
                pair.b.copy_(b[self.what.rows(matrix, self._ranks, rank)])

    def sharded_state_dict(self, prefix: str, sharded_offsets: tuple[Any, ...], metadata: Any) -> dict[str, Any]:
        """Megatron-Core's description of this rank's parts for a checkpoint."""
        found: dict[str, Any] = {}
        for matrix, pair in zip(self.what.matrices, self._pairs, strict=True):
            name = f"{prefix}{matrix.target}."
            tensors = make_sharded_tensors_for_checkpoint(
                {"a": pair.a, "b": pair.b},
                name,
                {"a": 1} if self.what.splits_input else {"b": 0},
                sharded_offsets,
                tp_group=self._group,
                dp_cp_group=metadata["dp_cp_group"],
            )
            if self.what.joins_halves:
                tensors[f"{name}b"] = apply_swiglu_sharded_factory(tensors[f"{name}b"], sharded_offsets)
            found |= tensors
        return found


def _reduce(low: Tensor) -> Tensor:
    summed: Tensor = reduce_from_tensor_model_parallel_region(low)
    return summed


def _gather(low: Tensor) -> Tensor:
    """Of all tokens; the gradient, which is another on each rank, is summed while it is scattered back."""
    gathered: Tensor = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True)
    return gathered


class _WithAdapter:
    """A linear layer of Megatron-Core with an ``adapter``: mixed into the layer's own class, local or Transformer
    Engine's."""

    adapter: Adapter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if not self.adapter.enabled:
            return output, bias
        if (norm := getattr(self, "layer_norm_weight", None)) is not None:
            # Transformer Engine's layer has the norm before it inside, and does not give its output away.
            x = rms_norm(x, norm.shape, norm, self.eps)  # type: ignore[attr-defined]
        return output + self.adapter(x), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        own = f"{prefix}{ADAPTER}."
        # The layer describes every parameter below it, and would take the adapter's for whole on every rank.
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        state = {name: value for name, value in state.items() if not name.startswith(own)}
        return state | self.adapter.sharded_state_dict(own, sharded_offsets, metadata)


class _WithAdapters:
    """Transformer Engine's linear layer of all experts of a rank: ``adapter`` has one for each."""

    adapter: nn.ModuleList

    def forward(self, x: Tensor, tokens_per_expert: list[int]) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(x, tokens_per_expert)  # type: ignore[misc]
        adapters: list[Any] = list(self.adapter)
        if not adapters[0].enabled:
            return output, bias
        shares = zip(adapters, x.split(tokens_per_expert), strict=True)
        return output + torch.cat([adapter(share) for adapter, share in shares]), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """By the names of single experts: a checkpoint does not say how they were computed."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        num_experts = parallel_state.get_expert_model_parallel_world_size() * len(self.adapter)
        adapter: Any
        for number, adapter in enumerate(self.adapter):
            name = f"{prefix}{ADAPTER}.{number}."
            offsets = (*sharded_offsets, (len(sharded_offsets), adapter.index[1], num_experts))
            found = adapter.sharded_state_dict(name, offsets, metadata)
            replace_prefix_for_sharding(found, name, f"{prefix}{ADAPTER}.")
            for value in found.values():  # replicas of an expert, not of attention
                value.replica_id = (*value.replica_id[:2], parallel_state.get_expert_data_parallel_rank())
            state |= found
        return state


@functools.cache
def _class_with(mixin: type, kind: type) -> type:
    return type(f"{kind.__name__}{mixin.__name__.strip('_')}", (mixin, kind), {})


def add_adapters(chunk: Any, linears: Mapping[str, AdaptedLinear], lora: LoRA) -> None:
    """Freeze a model chunk and give its linear layers adapters, whose values are not set. Call it before DDP."""
    for weight in chunk.parameters():
        weight.requires_grad_(False)
    make = functools.partial(Adapter, lora=lora, sequence=chunk.config.sequence_parallel)
    for layer in chunk.decoder.layers:
        number = layer.layer_number - 1
        for name, linear in list(layer.named_modules()):
            what = linears.get(LAYERS + _EXPERT.sub("experts", name.replace(*_GROUPED)))
            if what is None:
                continue
            if name.startswith(_GROUPED[0]):
                first = parallel_state.get_expert_model_parallel_rank() * linear.num_gemms
                weights = [getattr(linear, f"weight{expert}") for expert in range(linear.num_gemms)]
                adapters = [make(weight, what, (number, first + expert)) for expert, weight in enumerate(weights)]
                linear.__class__ = _class_with(_WithAdapters, linear.__class__)
                linear.adapter = nn.ModuleList(adapters)
                continue
            index: tuple[int, ...] = (number,)
            if match := _EXPERT.search(name):
                held = len(layer.mlp.experts.local_experts)
                index = (*index, parallel_state.get_expert_model_parallel_rank() * held + int(match[1]))
            linear.__class__ = _class_with(_WithAdapter, linear.__class__)
            linear.adapter = make(linear.weight, what, index)
    if chunk.pre_process and chunk.config.recompute_granularity is not None:
        # What is recomputed has a gradient where its input has one, and the frozen embedding's output has none.
        chunk.embedding.register_forward_hook(_require_grad)


def _require_grad(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()


def adapters_of(chunks: Sequence[nn.Module]) -> Iterator[Adapter]:
    return (module for chunk in chunks for module in chunk.modules() if isinstance(module, Adapter))


def initial_factors(seed: int) -> Factors:
    """PEFT's initialisation: A uniform (Kaiming with a = sqrt(5): within 1 / sqrt(in)), B zero.

    A matrix's numbers depend on ``seed`` and its name alone, so they are the same at every layout.
    """

    def factors(name: str, shape: tuple[int, int], rank: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(stable_hash(seed, name) % 2**63)
        a = torch.empty(rank, shape[1], device="cpu")
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        return a, torch.zeros(shape[0], rank, device="cpu")

    return factors

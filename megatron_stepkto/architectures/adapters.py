"""Low-rank adapters (LoRA): the Hugging Face matrices of a model that may have one, and their place in Megatron's.

Megatron-Core stacks query, key and value in one matrix, and gate and up in another. In PEFT each Hugging Face matrix
has an adapter of its own, so one Megatron-Core layer has as many adapters as it holds Hugging Face matrices. Everything
follows from the ``Entry`` of its weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_stepkto.architectures.mapping import Entry
from megatron_stepkto.architectures.model_config import ModelConfig
from megatron_stepkto.architectures.sharding import StageParameters, stage_layers
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.recipe.keys import LoRA, Parallel

_ROW = (".linear_proj", ".linear_fc2")  # input features are split over tensor-parallel ranks; of the others, output
_LINEARS = (".linear_qkv", ".linear_fc1", *_ROW)
_WEIGHT = ".weight"
# Below a layer's key in a checkpoint: `<key>.adapter.<target>.a` [..., rank, in] and `.b` [..., out, rank].
ADAPTER = "adapter"


@dataclass(frozen=True)
class Matrix:
    """A Hugging Face matrix with an adapter. part: its number in the entry of the Megatron-Core layer that holds it."""

    part: int
    target: str


@dataclass(frozen=True)
class AdaptedLinear:
    """A Megatron-Core linear layer (of every model layer, and expert) with the adapters of its Hugging Face matrices.

    Attributes:
        entry: of its weight.
        matrices: those with an adapter, in the entry's order.
    """

    entry: Entry
    matrices: tuple[Matrix, ...]

    @property
    def key(self) -> str:
        """Megatron-Core's name of the layer."""
        return self.entry.key.removesuffix(_WEIGHT)

    @property
    def splits_input(self) -> bool:
        """Whether tensor-parallel ranks hold parts of the input features; else of the output features."""
        return self.key.endswith(_ROW)

    @property
    def of_expert(self) -> bool:
        """Whether it is an expert's, which expert tensor parallelism splits in place of tensor parallelism."""
        return len(self.entry.lead) == 2

    @property
    def joins_halves(self) -> bool:
        """Gate and up in one Hugging Face matrix: a rank's rows are a part of each half."""
        return self.key.endswith(".linear_fc1") and len(self.entry.hf) == 1

    def hf_name(self, matrix: Matrix, index: tuple[int, ...]) -> str:
        """The module's name, ``model.layers.0.self_attn.q_proj``; index: (layer,) or (layer, expert)."""
        return self.entry.hf_names(index)[matrix.part].removesuffix(_WEIGHT)

    def hf_shape(self, matrix: Matrix) -> tuple[int, int]:
        """(output features, input features) of the whole matrix."""
        rows, columns = self.entry.hf_shapes()[matrix.part]
        return rows, columns

    def rows(self, matrix: Matrix, ranks: int = 1, rank: int = 0) -> Tensor:
        """The matrix's rows that a tensor-parallel rank holds, in the order of its Megatron-Core weight: int64.

        ranks: 1 for the whole weight, as in a checkpoint.
        """
        sources = torch.full((self.entry.shape[0],), -1, device="cpu")  # of other matrices
        for run in self.entry.runs:
            if run.part == matrix.part:
                sources[run.target : run.target + run.count] = torch.arange(run.source, run.source + run.count)
        if not self.splits_input:
            parts = sources.chunk(2) if self.key.endswith(".linear_fc1") else (sources,)
            sources = torch.cat([part.chunk(ranks)[rank] for part in parts])
        return sources[sources >= 0]

    def pattern(self, ranks: int) -> tuple[int, tuple[int, ...]]:
        """(times, rows per part): a rank's output is so many times these rows of each Hugging Face matrix in turn."""
        size = self.entry.shape[0] if self.splits_input else self.entry.shape[0] // ranks
        parts = len(self.entry.hf)
        if parts == 1:
            return 1, (size,)
        counts = [run.count for run in self.entry.runs[:parts]]
        times = max(1, size // sum(counts))
        return times, tuple(count * (size // times) // sum(counts) for count in counts)


def adapted_linears(
    entries: Sequence[Entry], targets: Sequence[str] | str, place: str = "train.lora.targets"
) -> dict[str, AdaptedLinear]:
    """The layers with an adapter by Megatron-Core's name.

    Args:
        targets: last parts of Hugging Face names (q_proj), or "all".
        place: of the key, for the message.

    Raises:
        UserError: the model has no such matrix; names those that it has.
    """
    linears = [entry for entry in entries if entry.key.endswith(tuple(f"{name}{_WEIGHT}" for name in _LINEARS))]
    known = dict.fromkeys(_target(name) for entry in linears for name in entry.hf)
    wanted = set(known if targets == "all" else targets)
    if unknown := sorted(wanted - known.keys()):
        raise UserError(
            f"{place}: the model has no linear layer {', '.join(unknown)} that can have an adapter; expected all, or "
            f"some of {', '.join(known)}"
        )
    found = {}
    for entry in linears:
        chosen = [Matrix(part, _target(name)) for part, name in enumerate(entry.hf) if _target(name) in wanted]
        if chosen:
            linear = AdaptedLinear(entry, tuple(chosen))
            found[linear.key] = linear
    return found


def _target(hf_name: str) -> str:
    return hf_name.removesuffix(_WEIGHT).rpartition(".")[2]


def adapter_parameters(
    config: ModelConfig, entries: Sequence[Entry], lora: LoRA, parallel: Parallel, stage: int
) -> StageParameters:
    """Elements of the adapters on a rank of pipeline stage ``stage``; equal on all its tensor ranks."""
    dense = experts = 0
    for linear in adapted_linears(entries, lora.targets).values():
        ranks = parallel.expert_tensor if linear.of_expert else parallel.tensor
        count = 0
        for matrix in linear.matrices:
            rows, columns = linear.hf_shape(matrix)
            a = columns // ranks if linear.splits_input else columns
            b = rows if linear.splits_input else rows // ranks
            count += lora.rank * (a + b)
        if linear.of_expert:
            experts += count * math.prod(linear.entry.lead[1:]) // parallel.expert
        else:
            dense += count
    layers = [len(numbers) for numbers in stage_layers(config, parallel, stage)]
    return StageParameters(
        tuple((dense + experts) * count for count in layers), tuple(experts * count for count in layers), 0, 0
    )


def low_rank_width(config: ModelConfig, entries: Sequence[Entry], lora: LoRA, parallel: Parallel) -> float:
    """Elements per token that the adapters of one model layer keep on a rank for the backward pass: each A x."""
    width = 0.0
    for linear in adapted_linears(entries, lora.targets).values():
        count: float = lora.rank * len(linear.matrices)
        if linear.of_expert:  # of the experts that a token goes to; tensor-parallel ranks share the tokens, and those
            assert config.experts is not None  # that share an expert gather them
            count *= config.experts.per_token * parallel.expert_tensor / parallel.tensor
        elif linear.splits_input and parallel.sequence:
            count /= parallel.tensor
        width += count
    return width


def describe_targets(linears: Mapping[str, AdaptedLinear]) -> list[str]:
    """The names of all targets, as PEFT lists them."""
    return sorted({matrix.target for linear in linears.values() for matrix in linear.matrices})

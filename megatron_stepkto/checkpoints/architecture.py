"""What an architecture declares: how to read its config, and how its weights map to Megatron-Core's.

A mapping is declared once and played both ways. Megatron-Core stacks a weight over layers
(``decoder.layers.mlp.linear_fc1.weight`` is [L, 2F, H]); an entry maps one layer's slice of such a key to one
or more Hugging Face tensors and back. Both directions only copy bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_stepkto.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (config key rope_scaling / rope_parameters with rope_type llama3)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class ModelConfig:
    """An architecture-neutral decoder. Sizes in elements, not bytes."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_base: float
    rope_scaling: RopeScaling | None
    tied: bool

    def inv_freq(self) -> Tensor:
        """[head_dim / 2] float32 rotary frequencies, as transformers computes them."""
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu")  # also under a meta-device context
        inv_freq = 1.0 / (self.rope_base ** (steps / self.head_dim))
        scaling = self.rope_scaling
        if scaling is None:
            return inv_freq
        wavelength = 2 * math.pi / inv_freq
        low = scaling.original_max_positions / scaling.low_freq_factor
        high = scaling.original_max_positions / scaling.high_freq_factor
        smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        scaled = torch.where(wavelength > low, inv_freq / scaling.factor, inv_freq)
        between = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
        return torch.where((wavelength >= high) & (wavelength <= low), between, scaled)


class Entry(Protocol):
    """One Megatron-Core key and the Hugging Face tensors it is made of; ``{layer}`` stands for the layer."""

    @property
    def key(self) -> str: ...
    def hf_names(self, layer: int) -> list[str]: ...
    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of one layer's slice (of the whole key where the key is not per layer)."""
        ...

    def to_megatron(self, tensors: list[Tensor], config: ModelConfig) -> Tensor: ...
    def to_hf(self, tensor: Tensor, config: ModelConfig) -> list[Tensor]: ...


def is_per_layer(entry: Entry) -> bool:
    return entry.key.startswith("decoder.layers.")


@dataclass(frozen=True)
class Same:
    """One tensor, unchanged."""

    key: str
    hf: str
    size: Callable[[ModelConfig], tuple[int, ...]]

    def hf_names(self, layer: int) -> list[str]:
        return [self.hf.format(layer=layer)]

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        return self.size(config)

    def to_megatron(self, tensors: list[Tensor], config: ModelConfig) -> Tensor:
        return tensors[0]

    def to_hf(self, tensor: Tensor, config: ModelConfig) -> list[Tensor]:
        return [tensor]


@dataclass(frozen=True)
class GateUp:
    """Gate and up projection, one above the other: [2F, H]."""

    key: str
    gate: str
    up: str

    def hf_names(self, layer: int) -> list[str]:
        return [self.gate.format(layer=layer), self.up.format(layer=layer)]

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        return (2 * config.ffn_size, config.hidden_size)

    def to_megatron(self, tensors: list[Tensor], config: ModelConfig) -> Tensor:
        return torch.cat(tensors)

    def to_hf(self, tensor: Tensor, config: ModelConfig) -> list[Tensor]:
        return [part.contiguous() for part in tensor.chunk(2)]


@dataclass(frozen=True)
class QKV:
    """Query, key and value interleaved by group: for each kv head its query heads, then its key, then its value."""

    key: str
    query: str
    key_: str
    value: str

    def hf_names(self, layer: int) -> list[str]:
        return [name.format(layer=layer) for name in (self.query, self.key_, self.value)]

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        return ((config.num_heads + 2 * config.num_kv_heads) * config.head_dim, config.hidden_size)

    def to_megatron(self, tensors: list[Tensor], config: ModelConfig) -> Tensor:
        groups, trailing = config.num_kv_heads, tensors[0].shape[1:]
        parts = [tensor.view(groups, -1, *trailing) for tensor in tensors]
        return torch.cat(parts, dim=1).reshape(-1, *trailing)

    def to_hf(self, tensor: Tensor, config: ModelConfig) -> list[Tensor]:
        groups, trailing = config.num_kv_heads, tensor.shape[1:]
        per_group = config.num_heads // groups * config.head_dim
        parts = tensor.view(groups, -1, *trailing).split([per_group, config.head_dim, config.head_dim], dim=1)
        return [part.reshape(-1, *trailing) for part in parts]


@dataclass(frozen=True)
class Architecture:
    """``names`` are the values of config.json's ``architectures`` that it serves."""

    names: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    entries: Callable[[ModelConfig], list[Entry]]


def find_architecture(hf_config: Mapping[str, Any], where: str) -> Architecture:
    """Raises UserError when config.json names an architecture without a declaration."""
    from megatron_stepkto.checkpoints import ARCHITECTURES

    named = hf_config.get("architectures") or [None]
    for architecture in ARCHITECTURES:
        if named[0] in architecture.names:
            return architecture
    known = ", ".join(name for architecture in ARCHITECTURES for name in architecture.names)
    raise UserError(
        f"{where}: expected architectures to be one of {known}, got {named[0]}; "
        "an architecture is one declaration in megatron_stepkto/checkpoints/"
    )

"""The pieces that a conversion is cut into: which rows of which Hugging Face tensor go where in Megatron's keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_stepkto.architectures.mapping import LAYERS, Entry
from megatron_stepkto.architectures.model_config import ModelConfig


@dataclass(frozen=True)
class Slice:
    """One slice of an entry: a layer's, or one expert's of a layer."""

    entry: Entry
    index: tuple[int, ...]

    @property
    def key(self) -> str:
        return self.entry.key

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.entry.hf_names(self.index))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(self.entry.hf_shapes())

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of its Hugging Face tensors."""
        return zip(self.names, self.shapes, strict=True)


def slices(entries: list[Entry]) -> list[Slice]:
    """Every slice, layer by layer."""
    return sorted((Slice(entry, index) for entry in entries for index in entry.indices()), key=lambda s: s.index)


def extra_state_keys(config: ModelConfig) -> list[str]:
    """Byte entries of a checkpoint that are empty without Transformer Engine, but required by a strict load."""
    layers = config.num_layers
    modules = ["self_attention.linear_proj", "self_attention.linear_qkv"]
    if config.experts is None:
        modules += ["mlp.linear_fc1", "mlp.linear_fc2"]
    keys = [f"{LAYERS}{module}._extra_state/shard_{layer}_{layers}" for module in modules for layer in range(layers)]
    if config.experts:
        number = config.experts.number
        keys += [
            f"{LAYERS}mlp.experts.experts.{linear}._extra_state/shard_{layer}.{expert}_{layers}.{number}"
            for linear in ("linear_fc1", "linear_fc2")
            for layer in range(layers)
            for expert in range(number)
        ]
    return keys

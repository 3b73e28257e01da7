"""What an architecture declares: how to read its config, and how its weights map to Megatron-Core's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_stepkto.architectures.mapping import Entry
from megatron_stepkto.architectures.rope import Rope
from megatron_stepkto.base.errors import UserError


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in every layer: each token goes to its top-k experts, none is dropped.

    renormalize: the weights of a token's experts sum to 1 (a softmax over its top-k scores); else they are its
    probabilities among all experts.
    """

    number: int
    per_token: int
    ffn_size: int
    renormalize: bool

    def __post_init__(self) -> None:
        if self.per_token == 1 and self.renormalize:
            raise UserError(
                "config.json: num_experts_per_tok = 1 is not supported where the experts' weights are made to sum to "
                "1: Megatron-Core's router refuses it (the weight is always 1 and the router cannot learn); expected "
                "2 or more, or norm_topk_prob = false"
            )


@dataclass(frozen=True)
class ModelConfig:
    """An architecture-neutral decoder. Sizes in elements, not bytes.

    ffn_size: of a dense layer; unused where every layer has experts.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope: Rope
    tied: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: Experts | None = None

    def inv_freq(self) -> Tensor:
        """[head_dim / 2] float32 rotary frequencies, as transformers computes them."""
        return self.rope.inv_freq(self.head_dim)


@dataclass(frozen=True)
class Architecture:
    """``names``: the values of config.json's ``architectures`` that it supports."""

    names: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    entries: Callable[[ModelConfig], list[Entry]]

"""Mistral 7B, Nemo and related models, and the mixture of experts Mixtral."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from megatron_stepkto.architectures.decoder import (
    check_sizes,
    check_window,
    decoder_entries,
    mixture_entries,
    read_decoder,
)
from megatron_stepkto.architectures.model_config import Architecture, Experts, ModelConfig

_WINDOW = {"sliding_window", "layer_types"}


def read_mistral(hf: Mapping[str, Any]) -> ModelConfig:
    # transformers' defaults where config.json does not set them
    hf = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096, **hf}
    config = read_decoder(hf, "Mistral", read=_WINDOW)
    check_window(hf, hf["sliding_window"])
    return config


def read_mixtral(hf: Mapping[str, Any]) -> ModelConfig:
    hf = {"num_key_value_heads": 8, "max_position_embeddings": 131072, **hf}
    read = {*_WINDOW, "num_local_experts", "num_experts_per_tok"}
    check_sizes(hf, ("num_local_experts", "num_experts_per_tok"))
    check_window(hf, hf.get("sliding_window"))
    experts = Experts(
        number=hf["num_local_experts"],
        per_token=hf["num_experts_per_tok"],
        ffn_size=hf["intermediate_size"],
        renormalize=True,
    )
    return read_decoder(hf, "Mixtral", read=read, norm_eps=1e-5, rope_base=1e6, experts=experts)


MISTRAL = Architecture(names=("MistralForCausalLM",), read_config=read_mistral, entries=decoder_entries)
MIXTRAL = Architecture(
    names=("MixtralForCausalLM",),
    read_config=read_mixtral,
    entries=partial(mixture_entries, block="block_sparse_moe", gate="w1", up="w3", down="w2"),
)

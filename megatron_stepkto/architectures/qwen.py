"""Qwen2 and Qwen2.5 (QKV bias), Qwen3 (query and key norms), and the mixture of experts Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from megatron_stepkto.architectures.decoder import (
    check_sizes,
    check_switch,
    check_window,
    decoder_entries,
    mixture_entries,
    read_decoder,
)
from megatron_stepkto.architectures.model_config import Architecture, Experts, ModelConfig
from megatron_stepkto.base.errors import UserError

_WINDOW = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}


def _check_window(hf: Mapping[str, Any]) -> None:
    """Only layers from ``max_window_layers`` on have a window, and only where ``use_sliding_window`` is set."""
    check_switch(hf, "use_sliding_window")
    layers = hf.get("layer_types")
    if not hf.get("use_sliding_window"):
        if "sliding_attention" in (layers or ()):
            raise UserError(
                "config.json: layer_types names sliding_attention, but use_sliding_window is not true; "
                "correct the one that is wrong"
            )
        return
    first = hf.get("max_window_layers", 28)
    if type(first) is not int:
        raise UserError(f"config.json: max_window_layers = {first!r:.80}: expected a whole number")
    slides = "sliding_attention" in layers if layers else first < hf["num_hidden_layers"]
    if slides:
        check_window(hf, hf.get("sliding_window", 4096))


def read_qwen2(hf: Mapping[str, Any]) -> ModelConfig:
    hf = {"max_position_embeddings": 32768, **hf}
    config = read_decoder(hf, "Qwen2", read=_WINDOW, qkv_bias=True)
    _check_window(hf)
    return config


def read_qwen3(hf: Mapping[str, Any]) -> ModelConfig:
    hf = {"max_position_embeddings": 32768, "head_dim": 128, **hf}
    config = read_decoder(hf, "Qwen3", read=_WINDOW, qk_norm=True)
    _check_window(hf)
    return config


def read_qwen3_moe(hf: Mapping[str, Any]) -> ModelConfig:
    hf = {"max_position_embeddings": 32768, "num_key_value_heads": 4, **hf}
    # transformers 5 writes num_local_experts, earlier versions num_experts
    number = hf["num_local_experts"] if "num_local_experts" in hf else hf["num_experts"]
    read = {
        *_WINDOW,
        *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
        *("decoder_sparse_step", "mlp_only_layers"),
    }
    check_sizes(hf, ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"))
    check_switch(hf, "norm_topk_prob")
    for key, expected in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        if hf.get(key) not in (None, expected):
            raise UserError(
                f"config.json: {key} = {hf[key]!r} is not supported for Qwen3-MoE; expected {expected!r}: "
                "every layer has experts"
            )
    if hf.get("use_sliding_window"):
        check_window(hf, hf.get("sliding_window", 4096))
    experts = Experts(
        number=number,
        per_token=hf["num_experts_per_tok"],
        ffn_size=hf["moe_intermediate_size"],
        renormalize=bool(hf.get("norm_topk_prob", False)),
    )
    return read_decoder(hf, "Qwen3-MoE", read=read, qk_norm=True, experts=experts)


QWEN2 = Architecture(names=("Qwen2ForCausalLM",), read_config=read_qwen2, entries=decoder_entries)
QWEN3 = Architecture(names=("Qwen3ForCausalLM",), read_config=read_qwen3, entries=decoder_entries)
QWEN3_MOE = Architecture(
    names=("Qwen3MoeForCausalLM",),
    read_config=read_qwen3_moe,
    entries=partial(mixture_entries, block="mlp", gate="gate_proj", up="up_proj", down="down_proj"),
)

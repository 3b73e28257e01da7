"""Llama 2, 3, 3.1, 3.2 and 3.3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_stepkto.checkpoints.architecture import QKV, Architecture, Entry, GateUp, ModelConfig, RopeScaling, Same
from megatron_stepkto.errors import UserError

_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Raises UserError on a setting that would silently change the model (bias, other activation or RoPE)."""
    for key, expected in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if hf.get(key, expected) != expected:
            raise UserError(f"config.json: {key} = {hf[key]!r} is not supported for Llama; expected {expected!r}")
    for key in _SIZES:
        if hf.get(key) is not None and (type(hf[key]) is not int or hf[key] < 1):
            raise UserError(f"config.json: {key} = {hf[key]!r}: expected a whole number, 1 or more")
    if hf["num_attention_heads"] % (hf.get("num_key_value_heads") or 1):
        raise UserError(
            f"config.json: num_key_value_heads = {hf['num_key_value_heads']} does not divide "
            f"num_attention_heads = {hf['num_attention_heads']}"
        )
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    return ModelConfig(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        ffn_size=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        max_positions=hf.get("max_position_embeddings", 2048),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        # transformers 5 writes rope_theta inside rope_parameters, older versions beside it
        rope_base=float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))),
        rope_scaling=_rope_scaling(rope),
        tied=bool(hf.get("tie_word_embeddings", False)),
    )


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"config.json: RoPE type {kind!r} is not supported for Llama; expected default or llama3")
    return RopeScaling(
        rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    )


def entries(config: ModelConfig) -> list[Entry]:
    layer = "model.layers.{layer}."
    attention, mlp = layer + "self_attn.", layer + "mlp."
    found: list[Entry] = [
        Same("embedding.word_embeddings.weight", "model.embed_tokens.weight", lambda c: (c.vocab_size, c.hidden_size)),
        # Megatron-Core names the norms after Transformer Engine's fused modules, also in its local spec.
        Same(
            "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
            layer + "input_layernorm.weight",
            lambda c: (c.hidden_size,),
        ),
        QKV(
            "decoder.layers.self_attention.linear_qkv.weight",
            attention + "q_proj.weight",
            attention + "k_proj.weight",
            attention + "v_proj.weight",
        ),
        Same(
            "decoder.layers.self_attention.linear_proj.weight",
            attention + "o_proj.weight",
            lambda c: (c.hidden_size, c.num_heads * c.head_dim),
        ),
        Same(
            "decoder.layers.mlp.linear_fc1.layer_norm_weight",
            layer + "post_attention_layernorm.weight",
            lambda c: (c.hidden_size,),
        ),
        GateUp("decoder.layers.mlp.linear_fc1.weight", mlp + "gate_proj.weight", mlp + "up_proj.weight"),
        Same("decoder.layers.mlp.linear_fc2.weight", mlp + "down_proj.weight", lambda c: (c.hidden_size, c.ffn_size)),
        Same("decoder.final_layernorm.weight", "model.norm.weight", lambda c: (c.hidden_size,)),
    ]
    if not config.tied:
        found.append(Same("output_layer.weight", "lm_head.weight", lambda c: (c.vocab_size, c.hidden_size)))
    return found


LLAMA = Architecture(names=("LlamaForCausalLM",), read_config=read_config, entries=entries)

"""What the decoders in this package share: keys of config.json, and weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megatron_stepkto.architectures.mapping import LAYERS, Entry, gate_up, qkv, same
from megatron_stepkto.architectures.model_config import ModelConfig
from megatron_stepkto.architectures.rope import check_number, read_rope
from megatron_stepkto.base.errors import UserError

SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
_MAY_BE_NULL = {"num_key_value_heads", "head_dim", "sliding_window"}
_READ = {*SIZES, "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings"}
# Names and settings on which no logit depends.
_HARMLESS = {
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "transformers.js_config"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "tokenizer_class", "id2label", "label2id"),
    *("use_cache", "initializer_range", "pretraining_tp", "num_labels", "problem_type", "task_specific_params"),
    *("output_router_logits", "router_aux_loss_coef", "return_dict", "unsloth_fixed", "unsloth_version"),
    *("attn_implementation", "is_decoder", "keys_to_ignore_at_inference", "license", "is_llama_config"),
    # generation settings that old writers left here; LLaMA's own max_sequence_length
    *("max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "num_beams", "repetition_penalty"),
    "max_sequence_length",
    "auto_map",  # the author's own code: never run, and the conversion warns of it
}
# The only supported value.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1,
    "attention_dropout": 0,
    "resid_pdrop": 0,
    "embd_pdrop": 0,
    "router_jitter_noise": 0,
    "is_causal": True,
}
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_keys(hf: Mapping[str, Any], name: str, read: set[str]) -> None:
    """Raises UserError, naming all keys, for a setting that could change the model's output and is not supported.

    Args:
        name: the architecture, for the message.
        read: keys that this architecture reads in addition to the common ones.
    """
    faults = []
    for key, value in hf.items():
        if key in _READ | read | _HARMLESS or key.startswith("_"):
            continue
        if key in _FIXED:
            if value is not None and value != _FIXED[key]:
                faults.append(f"{key} = {value!r} is not supported for {name}; expected {_FIXED[key]!r}")
        elif value:  # an unknown switch that is off (null, false, 0, empty) has no effect
            faults.append(
                f"{key} = {value!r} is not known for {name} and may change the model; "
                "remove the key from config.json if it does not"
            )
    if faults:
        raise UserError("config.json: " + "; ".join(faults))


def check_sizes(hf: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    """Raises UserError for a size that is set to anything but a positive whole number (some may be null)."""
    for key in keys:
        if key not in hf or (hf[key] is None and key in _MAY_BE_NULL):
            continue
        if type(hf[key]) is not int or hf[key] < 1:
            raise UserError(f"config.json: {key} = {hf[key]!r}: expected a whole number, 1 or more")


def check_switch(hf: Mapping[str, Any], key: str) -> None:
    """Raises UserError for a switch that is set to anything but true, false or null."""
    if not isinstance(hf.get(key), bool | None):
        raise UserError(f"config.json: {key} = {hf[key]!r:.80}: expected true or false")


def check_layer_types(hf: Mapping[str, Any]) -> None:
    """Raises UserError for an unsupported kind of attention, or a list of another length than the number of layers."""
    kinds = hf.get("layer_types") or []
    if not isinstance(kinds, list) or len(kinds) not in (0, hf["num_hidden_layers"]):
        raise UserError(
            f"config.json: layer_types = {kinds!r:.80}: expected a list of num_hidden_layers = "
            f"{hf['num_hidden_layers']} kinds of attention"
        )
    if other := sorted(set(map(str, kinds)) - _LAYER_TYPES):
        raise UserError(
            f"config.json: layer_types names {', '.join(other)}, which is not supported; expected "
            f"{', '.join(sorted(_LAYER_TYPES))}"
        )


def check_window(hf: Mapping[str, Any], window: int | None) -> None:
    """Raises UserError for a sliding attention window that a sequence within the model's length could exceed."""
    check_sizes(hf, ("max_position_embeddings", "sliding_window"))
    longest = hf["max_position_embeddings"]
    if window is not None and window < longest:
        raise UserError(
            f"config.json: sliding_window = {window} is shorter than max_position_embeddings = {longest} and is not "
            f"supported; if no prompt with its solution exceeds {window} tokens, set max_position_embeddings to "
            f"{window}: then the window changes nothing"
        )


def read_decoder(
    hf: Mapping[str, Any],
    name: str,
    *,
    read: Collection[str] = (),
    norm_eps: float = 1e-6,
    rope_base: float = 10000.0,
    **more: Any,
) -> ModelConfig:
    """The common part of config.json.

    Args:
        read: further keys that the architecture reads itself.
        norm_eps, rope_base: transformers' defaults for the architecture, where config.json does not set them.
        more: further fields of ModelConfig.

    Raises:
        UserError: a setting that would silently change the model.
        KeyError: a size is missing.
    """
    check_keys(hf, name, set(read))
    check_sizes(hf, SIZES)
    check_number(hf, "rms_norm_eps")
    check_layer_types(hf)
    tied = hf.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f"config.json: tie_word_embeddings = {tied!r}: expected true or false")
    heads = hf["num_attention_heads"]
    groups = hf.get("num_key_value_heads") or heads
    if heads % groups:
        raise UserError(f"config.json: num_key_value_heads = {groups} does not divide num_attention_heads = {heads}")
    if not hf.get("head_dim") and hf["hidden_size"] % heads:
        raise UserError(
            f"config.json: num_attention_heads = {heads} does not divide hidden_size = {hf['hidden_size']}, "
            "and head_dim is not set"
        )
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    if head_dim % 2:
        raise UserError(f"config.json: head_dim = {head_dim} is odd; rotary embeddings need an even one")
    return ModelConfig(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=head_dim,
        ffn_size=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        max_positions=hf.get("max_position_embeddings", 2048),
        norm_eps=hf.get("rms_norm_eps", norm_eps),
        rope=read_rope(hf, rope_base),
        tied=tied,
        **more,
    )


# --- weights -----------------------------------------------------------------------------------------------------

_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
# The norm before the feed-forward part, fused into it or not: Megatron-Core's module spec decides which.
_MLP_NORMS = (LAYERS + "mlp.linear_fc1.layer_norm_weight", LAYERS + "pre_mlp_layernorm.weight")


def embedding_entries(c: ModelConfig) -> list[Entry]:
    """Embedding, final norm and (untied) head."""
    words = (c.vocab_size, c.hidden_size)
    found = [
        same("embedding.word_embeddings.weight", "model.embed_tokens.weight", *words, pads_rows=True),
        same("decoder.final_layernorm.weight", "model.norm.weight", c.hidden_size),
    ]
    if not c.tied:
        found.append(same("output_layer.weight", "lm_head.weight", *words, pads_rows=True))
    return found


def attention_entries(c: ModelConfig) -> list[Entry]:
    """Norm and attention of every layer."""
    attention, layers, hidden = LAYERS + "self_attention.", c.num_layers, c.hidden_size

    def stacked_qkv(kind: str, columns: int | None) -> Entry:
        return qkv(
            f"{attention}linear_qkv.{kind}",
            (f"{_ATTENTION}q_proj.{kind}", f"{_ATTENTION}k_proj.{kind}", f"{_ATTENTION}v_proj.{kind}"),
            layers=layers,
            groups=c.num_kv_heads,
            heads=c.num_heads,
            head_dim=c.head_dim,
            columns=columns,
        )

    # Megatron-Core names the norms after Transformer Engine's fused modules, also in its local spec.
    norm, proj = attention + "linear_qkv.layer_norm_weight", attention + "linear_proj.weight"
    unfused = (LAYERS + "input_layernorm.weight",)
    found = [
        same(norm, _LAYER + "input_layernorm.weight", layers, hidden, stacked=1, aliases=unfused),
        stacked_qkv("weight", hidden),
        same(proj, _ATTENTION + "o_proj.weight", layers, hidden, c.num_heads * c.head_dim, stacked=1),
    ]
    if c.qkv_bias:
        found.append(stacked_qkv("bias", None))
    if c.qk_norm:
        found += [
            same(
                f"{attention}{part}_layernorm.weight", f"{_ATTENTION}{part}_norm.weight", layers, c.head_dim, stacked=1
            )
            for part in "qk"
        ]
    return found


def decoder_entries(c: ModelConfig) -> list[Entry]:
    """A dense decoder: Llama's names, with QKV bias and query and key norms where the config has them."""
    mlp, hf = LAYERS + "mlp.", _LAYER + "mlp."
    layers, hidden, ffn = c.num_layers, c.hidden_size, c.ffn_size
    norm, other = _MLP_NORMS
    return [
        *embedding_entries(c),
        *attention_entries(c),
        same(norm, _LAYER + "post_attention_layernorm.weight", layers, hidden, stacked=1, aliases=(other,)),
        gate_up(mlp + "linear_fc1.weight", hf + "gate_proj.weight", hf + "up_proj.weight", layers, 2 * ffn, hidden),
        same(mlp + "linear_fc2.weight", hf + "down_proj.weight", layers, hidden, ffn, stacked=1),
    ]


def mixture_entries(c: ModelConfig, *, block: str, gate: str, up: str, down: str) -> list[Entry]:
    """A decoder with experts in every layer; ``block`` and the three projections are Hugging Face's names."""
    assert c.experts is not None
    layers, hidden, number, ffn = c.num_layers, c.hidden_size, c.experts.number, c.experts.ffn_size
    router, experts = LAYERS + "mlp.router.weight", LAYERS + "mlp.experts.experts."
    # Transformer Engine's spec does not fuse this norm and uses this name; so does our local spec (megatron/model.py).
    other, norm = _MLP_NORMS
    gate, up, down = (f"{_LAYER}{block}.experts.{{expert}}.{name}.weight" for name in (gate, up, down))
    return [
        *embedding_entries(c),
        *attention_entries(c),
        same(norm, _LAYER + "post_attention_layernorm.weight", layers, hidden, stacked=1, aliases=(other,)),
        same(router, f"{_LAYER}{block}.gate.weight", layers, number, hidden, stacked=1),
        gate_up(experts + "linear_fc1.weight", gate, up, layers, number, 2 * ffn, hidden),
        same(experts + "linear_fc2.weight", down, layers, number, hidden, ffn, stacked=2),
    ]

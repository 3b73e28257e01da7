"""Phi-3 and Phi-4: Llama's decoder, with query, key and value in one tensor, and gate and up in another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_stepkto.architectures.decoder import check_window, decoder_entries, read_decoder
from megatron_stepkto.architectures.mapping import Entry, Run
from megatron_stepkto.architectures.model_config import Architecture, ModelConfig
from megatron_stepkto.base.errors import UserError


def read_phi3(hf: Mapping[str, Any]) -> ModelConfig:
    hf = {"max_position_embeddings": 4096, **hf}
    # the original length is only used by LongRoPE, which is refused
    config = read_decoder(hf, "Phi-3", read={"sliding_window", "original_max_position_embeddings"}, norm_eps=1e-5)
    if config.rope.scaling is not None:
        raise UserError("config.json: RoPE scaling is not supported for Phi-3; expected RoPE type default")
    check_window(hf, hf.get("sliding_window"))
    return config


def _fused(entry: Entry, name: str, starts: tuple[int, ...]) -> Entry:
    """An entry whose tensors are stacked by rows in one; ``starts``: the first row of each."""
    runs = (Run(0, starts[run.part] + run.source, run.target, run.count) for run in entry.runs)
    return replace(entry, hf=(f"model.layers.{{layer}}.{name}",), runs=tuple(runs))


def phi3_entries(c: ModelConfig) -> list[Entry]:
    query, key = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    found = []
    for entry in decoder_entries(c):
        if len(entry.hf) == 3:
            entry = _fused(entry, "self_attn.qkv_proj.weight", (0, query, query + key))
        elif len(entry.hf) == 2:
            entry = _fused(entry, "mlp.gate_up_proj.weight", (0, c.ffn_size))
        found.append(entry)
    return found


PHI3 = Architecture(names=("Phi3ForCausalLM",), read_config=read_phi3, entries=phi3_entries)

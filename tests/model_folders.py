"""One small random model per architecture, with weights, biases and norms large enough that a mistake in any shows; and
how tests read a tensor of a checkpoint."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.checkpoints.stream import Files
from megatron_stepkto.checkpoints.torch_dist import CheckpointReader

VOCABULARY = 99


@dataclass(frozen=True)
class Family:
    """``config_class`` of transformers with these settings besides the common ones."""

    config_class: str
    settings: dict[str, Any] = field(default_factory=dict)


LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 32}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama_untied": Family("LlamaConfig", {"num_key_value_heads": 4}),
    # Mistral-Nemo: heads x head_dim is not the hidden size
    "mistral": Family("MistralConfig", {"head_dim": 32, "sliding_window": None}),
    "phi3": Family("Phi3Config", {"pad_token_id": 0}),
    "qwen2": Family("Qwen2Config", {"rope_parameters": YARN_ROPE, "tie_word_embeddings": True}),
    "qwen3": Family("Qwen3Config", {"head_dim": 32}),
    "mixtral": Family("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": Family("Qwen3MoeConfig", {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3,
                                           "moe_intermediate_size": 24, "norm_topk_prob": True}),
    "qwen3_moe_plain": Family("Qwen3MoeConfig", {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
                                                 "moe_intermediate_size": 24, "norm_topk_prob": False,
                                                 "tie_word_embeddings": True}),
}  # fmt: skip


def write_model(directory: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Save a random model of a family (in the dtype ``changes`` names, float32 otherwise)."""
    import transformers

    made = FAMILIES[family]
    config = getattr(transformers, made.config_class)(
        **{
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 256,
            "initializer_range": 0.15,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **made.settings,
            **changes,
        }
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:  # biases begin as 0 and norms as 1: nobody would miss them
                weight.copy_(torch.randn_like(weight) * 0.2 + (0.0 if name.endswith("bias") else 1.0))
            elif "gate.weight" in name:  # a router: experts must differ in weight
                weight.copy_(torch.randn_like(weight) * 0.3)
    model.save_pretrained(directory)
    return directory


def read_tensor(
    reader: CheckpointReader, key: str, index: tuple[int, ...] = (), rows: int | None = None
) -> torch.Tensor:
    """The tensor ``key``, or its slice at ``index`` of the leading axes (layer, expert), cut to ``rows`` rows."""
    if faults := reader.check([key]):
        raise UserError("; ".join(faults))
    shape = reader.shapes()[key][len(index) :]
    if rows is not None:
        shape = (rows, *shape[1:])
    out = torch.empty(shape, dtype=reader.dtype(key))
    data = out.view(torch.uint8).numpy()
    inner = shape[: max(0, len(shape) - 2)]  # below these axes are rows and columns
    with Files() as files:
        for position in itertools.product(*map(range, inner)):
            reader.read_rows(files, key, (*index, *position), 0, shape[len(inner)], data[position].reshape(-1))
    return out

"""Whether a Hugging Face folder is a consistent model: small files, weights and config agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.model_folder import CONFIG, check_small_files, end_tokens, read_config
from megatron_stepkto.checkpoints.huggingface import HFCheckpoint

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def check_model_folder(directory: Path) -> Any:
    """Check that the folder can be loaded as a model, of any architecture; return transformers' config of it.

    Raises:
        UserError: config.json, the tokenizer's files or the weights' headers are damaged or contradict each other, or
            transformers does not know the config.
    """
    config = read_config(directory)
    check_small_files(directory)
    end_tokens(directory)
    weights = HFCheckpoint(directory).weights
    found = {match[1] for name in weights if (match := _LAYER.search(name))}
    layers = config.get("num_hidden_layers")
    if found and isinstance(layers, int) and layers > len(found):
        raise UserError(
            f"{directory}: the weights are not those of its config.json: num_hidden_layers = {layers}, the weights "
            f"hold {len(found)} layers"
        )
    return _transformers_config(directory)


def _transformers_config(directory: Path) -> Any:
    from transformers import AutoConfig, GenerationConfig

    name = CONFIG
    try:
        found = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        name = "generation_config.json"
        if (directory / name).exists():
            GenerationConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # another library may raise anything for unexpected values
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{directory / name}: transformers cannot use it ({reason}); correct it") from None
    return found

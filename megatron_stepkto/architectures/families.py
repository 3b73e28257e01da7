"""Hugging Face <-> Megatron-Core: one declaration per architecture, used in both directions."""

from collections.abc import Mapping
from typing import Any

from megatron_stepkto.architectures.llama import LLAMA
from megatron_stepkto.architectures.mistral import MISTRAL, MIXTRAL
from megatron_stepkto.architectures.model_config import Architecture
from megatron_stepkto.architectures.phi import PHI3
from megatron_stepkto.architectures.qwen import QWEN2, QWEN3, QWEN3_MOE
from megatron_stepkto.base.errors import UserError

ARCHITECTURES: tuple[Architecture, ...] = (LLAMA, MISTRAL, MIXTRAL, PHI3, QWEN2, QWEN3, QWEN3_MOE)


def find_architecture(hf_config: Mapping[str, Any], where: str) -> Architecture:
    """Raises UserError when config.json names an unsupported architecture."""
    named = hf_config.get("architectures") or [None]
    for architecture in ARCHITECTURES:
        if named[0] in architecture.names:
            return architecture
    known = ", ".join(name for architecture in ARCHITECTURES for name in architecture.names)
    raise UserError(
        f"{where}: expected architectures to be one of {known}, got {named[0]}; "
        "an architecture is one declaration in megatron_stepkto/architectures/ (see docs/architectures.md)"
    )

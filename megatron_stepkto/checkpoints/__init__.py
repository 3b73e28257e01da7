"""Hugging Face <-> Megatron-Core: one declaration per architecture, played both ways."""

from megatron_stepkto.checkpoints.architecture import Architecture
from megatron_stepkto.checkpoints.llama import LLAMA
from megatron_stepkto.checkpoints.mistral import MISTRAL, MIXTRAL
from megatron_stepkto.checkpoints.phi import PHI3
from megatron_stepkto.checkpoints.qwen import QWEN2, QWEN3, QWEN3_MOE

ARCHITECTURES: tuple[Architecture, ...] = (LLAMA, MISTRAL, MIXTRAL, PHI3, QWEN2, QWEN3, QWEN3_MOE)

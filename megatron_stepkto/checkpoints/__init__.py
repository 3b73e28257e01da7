"""Hugging Face <-> Megatron-Core: one declaration per architecture, played both ways."""

from megatron_stepkto.checkpoints.architecture import Architecture
from megatron_stepkto.checkpoints.llama import LLAMA

ARCHITECTURES: tuple[Architecture, ...] = (LLAMA,)

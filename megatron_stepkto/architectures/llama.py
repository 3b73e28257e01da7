"""Llama 2, 3, 3.1, 3.2 and 3.3."""

from __future__ import annotations

from functools import partial

from megatron_stepkto.architectures.decoder import decoder_entries, read_decoder
from megatron_stepkto.architectures.model_config import Architecture

read_config = partial(read_decoder, name="Llama")

LLAMA = Architecture(names=("LlamaForCausalLM",), read_config=read_config, entries=decoder_entries)

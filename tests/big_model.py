"""Llama folders of any size, written in seconds: a pattern of random bfloat16 numbers, shifted for every tensor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from megatron_stepkto.checkpoints.checksums import checksum
from megatron_stepkto.checkpoints.huggingface import HFWriter
from megatron_stepkto.checkpoints.slices import slices
from megatron_stepkto.checkpoints.stream import Files

_BLOCK = 32 * 2**20


def write_big_llama(
    directory: Path, layers: int, hidden: int = 2048, ffn: int = 8192, vocabulary: int = 32000
) -> tuple[int, int]:
    """Bytes of all weights, and of the largest tensor. 32 layers of the default sizes: 4.2 GB."""
    from megatron_stepkto.checkpoints.convert import read_model_config

    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": max(1, hidden // 512),
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    _, entries = read_model_config(directory)
    shapes = {n: s for slice_ in slices(entries) for n, s in slice_.tensors()}
    writer = HFWriter(directory, [(name, torch.bfloat16, shape) for name, shape in shapes.items()])
    numbers = torch.randn(_BLOCK // 2 + 2 * len(shapes), generator=torch.Generator().manual_seed(0))
    pattern = numbers.mul_(0.02).bfloat16().view(torch.uint8).numpy()
    with Files() as files:
        sums = {}
        for number, (name, weight) in enumerate(writer.weights.items()):
            block = np.ascontiguousarray(pattern[2 * number : 2 * number + _BLOCK])
            crc = 0
            for start in range(0, weight.num_bytes, _BLOCK):
                part = block[: min(_BLOCK, weight.num_bytes - start)]
                files.write(weight.path, weight.offset + start, part)
                crc = checksum(part, crc)
            sums[name] = (crc, weight.num_bytes)
        writer.finish(files, sums, {"config.json": (directory / "config.json").read_bytes()})
    sizes = [length for _, length in sums.values()]
    return sum(sizes), max(sizes)

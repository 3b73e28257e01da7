"""Model folders for the tests of checkpoints, and ways to spoil them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_stepkto.checkpoints.convert import hf_to_megatron, megatron_to_hf
from megatron_stepkto.errors import UserError

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GATE, UP = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"
QUERY, KEY = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change_config(folder: Path, **keys: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def refusal(call: Callable[[], object], target: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert target is None or not target.exists()
    return str(caught.value)


def forward_refusal(folder: Path) -> str:
    target = folder.parent / "target"
    return refusal(lambda: hf_to_megatron(folder, target), target)


def back_refusal(folder: Path) -> str:
    target = folder.parent / "target"
    return refusal(lambda: megatron_to_hf(folder, target), target)

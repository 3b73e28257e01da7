"""Model folders for the tests of checkpoints, and ways to spoil them."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.checkpoints.convert import COMPANIONS, hf_to_megatron, megatron_to_hf, read_model_config
from megatron_stepkto.megatron.acceleration import PLAIN, Acceleration
from megatron_stepkto.megatron.ranks import one_rank
from megatron_stepkto.recipe import keys as recipe

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


def shard(folder: Path, files: dict[str, str], twice: Sequence[str] = ()) -> dict[str, Tensor]:
    """Write the weights to the files named, those of ``twice`` to all of them, and the index; returns the weights."""
    weights = load_file(folder / "model.safetensors")
    for file in set(files.values()):
        save_file({n: t for n, t in weights.items() if files[n] == file or n in twice}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return weights


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


DATA_FILE = "__0_0.distcp"


class Chunk(NamedTuple):
    """The part of the tensor ``key`` of ``shape`` that begins at ``offset``."""

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor


def write_chunks(directory: Path, chunks: Iterable[Chunk]) -> None:
    """A torch_dist checkpoint of any chunks, by torch.save: as other writers cut them."""
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    with (directory / DATA_FILE).open("wb") as file:
        for chunk in chunks:
            properties = TensorProperties(dtype=chunk.tensor.dtype)
            entry = tensors.setdefault(chunk.key, TensorStorageMetadata(properties, torch.Size(chunk.shape), []))
            offset = torch.Size(chunk.offset)
            entry.chunks.append(ChunkStorageMetadata(offset, chunk.tensor.shape))
            buffer = io.BytesIO()
            torch.save(chunk.tensor.clone(memory_format=torch.contiguous_format), buffer)
            storage[MetadataIndex(chunk.key, offset)] = _StorageInfo(DATA_FILE, file.tell(), buffer.tell())
            file.write(buffer.getbuffer())
    metadata = Metadata(tensors, planner_data=None, storage_data=storage, storage_meta=StorageMeta())  # type: ignore[arg-type]
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def training_settings() -> recipe.Training:
    keys = {"parallel": {"distributed_optimizer": True}, "optimizer": {"lr": 0.01}, "global_batch_size": 1}
    return recipe.Training.model_validate({**keys, "device": "cpu"})


def load_in_megatron(folder: Path, acceleration: Acceleration = PLAIN) -> None:
    """As a rank loads the weights to train; ``acceleration``: of layers that read their states, or not."""
    from megatron_stepkto.megatron.engine import Engine  # Megatron-Core, which few of these tests need

    config, _ = read_model_config(folder / COMPANIONS)
    with one_rank(torch.device("cpu")):
        engine = Engine(config, training_settings(), torch.device("cpu"), train=False)
        engine.checkpoints._acceleration = acceleration
        engine.checkpoints.load_weights(folder)

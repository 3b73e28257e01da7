"""Hugging Face -> Megatron torch_dist and back, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_stepkto.checkpoints.architecture import Entry, ModelConfig, find_architecture, is_per_layer
from megatron_stepkto.checkpoints.huggingface import HFCheckpoint, copy_companions, write_hf
from megatron_stepkto.checkpoints.torch_dist import CheckpointReader, Chunk, write_checkpoint
from megatron_stepkto.errors import UserError
from megatron_stepkto.files import read_json

# Inside a Megatron folder: the Hugging Face config and tokenizer files, so that the way back needs nothing else.
COMPANIONS = "huggingface"
# Their rows are padded for tensor parallelism.
_PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")
_EXTRA_STATE_MODULES = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


def read_model_config(directory: Path) -> tuple[ModelConfig, list[Entry]]:
    """Config and weight mapping of a Hugging Face folder (or of a Megatron folder's companions)."""
    hf_config = read_json(directory / "config.json")
    if not isinstance(hf_config, dict):
        raise UserError(f"{directory / 'config.json'}: expected a JSON object, got {type(hf_config).__name__}")
    architecture = find_architecture(hf_config, str(directory / "config.json"))
    try:
        config = architecture.read_config(hf_config)
    except KeyError as error:
        raise UserError(
            f"{directory / 'config.json'}: key {error} is missing; it is needed to build the model"
        ) from None
    return config, architecture.entries(config)


def _names(entries: list[Entry], config: ModelConfig) -> set[str]:
    return {
        name
        for entry in entries
        for layer in range(config.num_layers if is_per_layer(entry) else 1)
        for name in entry.hf_names(layer)
    }


def _check_names(found: set[str], config: ModelConfig, entries: list[Entry], where: Path) -> None:
    expected = _names(entries, config)
    # A tied model may carry a copy of its embedding under the head's name: it says nothing new.
    extra = found - expected - ({"lm_head.weight"} if config.tied else set())
    extra = {name for name in extra if not name.endswith("rotary_emb.inv_freq")}
    faults = []
    if expected - found:
        faults.append(f"missing: {', '.join(sorted(expected - found))}")
    if extra:
        faults.append(f"not mapped: {', '.join(sorted(extra))}")
    if faults:
        raise UserError(f"{where}: the weights are not those of its config.json; " + "; ".join(faults))


def _check_tensors(checkpoint: HFCheckpoint, config: ModelConfig, entries: list[Entry], cast: bool) -> None:
    """Shapes one by one: wrong ones can fit when stacked. Dtypes: a stacked weight has but one."""
    faults = []
    for entry in entries:
        expected = [tuple(part.shape) for part in entry.to_hf(torch.empty(entry.shape(config), device="meta"), config)]
        dtypes: dict[str, list[str]] = {}
        for layer in range(config.num_layers if is_per_layer(entry) else 1):
            for name, shape in zip(entry.hf_names(layer), expected, strict=True):
                found, dtype = checkpoint.shape_and_dtype(name)
                dtypes.setdefault(dtype, []).append(name)
                if found != shape:
                    faults.append(f"{name} has shape {found}, config.json asks for {shape}")
        if len(dtypes) > 1 and not cast:
            fewest = min(dtypes, key=lambda dtype: len(dtypes[dtype]))
            faults.append(
                f"{', '.join(dtypes[fewest])} is {fewest}, the same weight of other layers or heads is "
                f"{', '.join(sorted(set(dtypes) - {fewest}))}; save the model in one dtype"
            )
    if faults:
        raise UserError(f"{checkpoint.directory}: " + "; ".join(faults))


def hf_to_megatron(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Convert a Hugging Face folder to a torch_dist checkpoint; ``target`` appears whole or not at all.

    Args:
        dtype: cast to this training dtype (None: keep, bit for bit).
    Raises:
        UserError: an unknown architecture, or a missing, left-over, misshapen or non-finite weight (all named).
    """
    checkpoint = HFCheckpoint(source)
    config, entries = read_model_config(source)
    _check_names(checkpoint.names(), config, entries, source)
    _check_tensors(checkpoint, config, entries, cast=dtype is not None)

    def chunks() -> Iterator[Chunk]:
        for entry in entries:
            shape = entry.shape(config)
            per_layer = is_per_layer(entry)
            for layer in range(config.num_layers if per_layer else 1):
                tensors = [_checked(checkpoint, name) for name in entry.hf_names(layer)]
                tensor = entry.to_megatron(tensors, config)
                assert tuple(tensor.shape) == shape, entry.key
                tensor = tensor.to(dtype) if dtype else tensor
                if per_layer:
                    yield Chunk(entry.key, (config.num_layers, *shape), (layer, *(0 for _ in shape)), tensor[None])
                else:
                    yield Chunk(entry.key, shape, (0,) * len(shape), tensor)

    extra_state = [
        f"decoder.layers.{module}._extra_state/shard_{layer}_{config.num_layers}"
        for module in _EXTRA_STATE_MODULES
        for layer in range(config.num_layers)
    ]
    temporary = _fresh(target)
    write_checkpoint(temporary, chunks(), extra_state)
    copy_companions(source, temporary / COMPANIONS)
    _publish(temporary, target)


def _checked(checkpoint: HFCheckpoint, name: str) -> Tensor:
    tensor = checkpoint.tensor(name)
    if not torch.isfinite(tensor).all():
        raise UserError(f"{checkpoint.directory}: {name} holds NaN or infinite values; the checkpoint is broken")
    return tensor


def megatron_to_hf(source: Path, target: Path) -> None:
    """Convert a torch_dist checkpoint (ours, or the trainer's at any layout) to a Hugging Face folder.

    Raises:
        UserError: a missing or left-over weight (all named), or a damaged file.
    """
    reader = CheckpointReader(source)
    companions = source / COMPANIONS
    if not companions.is_dir():
        raise UserError(
            f"{source}: expected a folder {COMPANIONS}/ with config.json and tokenizer files beside the "
            "weights; copy them there from the model the training began with"
        )
    config, entries = read_model_config(companions)
    shapes = reader.shapes()
    weights = {key for key in shapes if not key.startswith("optimizer.")}
    expected = {entry.key for entry in entries}
    faults = []
    if expected - weights:
        faults.append(f"missing: {', '.join(sorted(expected - weights))}")
    if weights - expected:
        faults.append(f"not mapped: {', '.join(sorted(weights - expected))}")
    for entry in entries:
        asked, found = entry.shape(config), shapes.get(entry.key)
        asked = (config.num_layers, *asked) if is_per_layer(entry) else asked
        rows_may_pad = entry.key in _PADDED and found is not None and len(found) == len(asked) and found[0] >= asked[0]
        if found is not None and found != (asked if not rows_may_pad else (found[0], *asked[1:])):
            faults.append(f"{entry.key} has shape {found}, expected {asked}")
    if faults:
        raise UserError(f"{source}: the weights are not those of {companions / 'config.json'}; " + "; ".join(faults))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for entry in entries:
            rows = entry.shape(config)[0]  # leaves out the rows that pad the vocabulary for tensor parallelism
            for layer in range(config.num_layers) if is_per_layer(entry) else (None,):
                tensor = reader.read(entry.key, layer, rows)
                yield from zip(entry.hf_names(layer or 0), entry.to_hf(tensor, config), strict=True)

    temporary = _fresh(target)
    write_hf(temporary, companions, tensors())
    _publish(temporary, target)


def _fresh(target: Path) -> Path:
    temporary = target.with_name(f".{target.name}.partial")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    return temporary


def _publish(temporary: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)

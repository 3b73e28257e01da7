"""Reading a torch_dist checkpoint's ``.metadata`` without letting it run code.

``.metadata`` is a raw pickle: whoever writes it can have a reader execute anything. Only the plain data
classes of torch.distributed.checkpoint may be built from it; everything else is refused.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_stepkto.base.errors import UserError

_DCP = "torch.distributed.checkpoint"
_ALLOWED = {
    *(
        (f"{_DCP}.metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    *((f"{_DCP}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath")),
}
_DTYPES = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}


class _Refused(pickle.UnpicklingError):
    """Not damage: the file asks for something that no checkpoint needs."""


class _Marker:
    """Stands for the empty classes that Megatron-Core up to 0.15 left in a checkpoint with optimizer states."""


_MARKERS = {("megatron.core.dist_checkpointing.strategies.torch", name) for name in ("MCoreMetadata", "MCoreSavePlan")}


class _RestrictedUnpickler(pickle._Unpickler):
    """In Python, whose memo is a dict: one damaged byte makes the one in C ask for 64 GB (its memo is an array)."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _MARKERS:
            return _Marker
        if (module, name) in _ALLOWED or (module == "torch" and name in _DTYPES):
            return super().find_class(module, name)
        raise _Refused(f"it asks for {module}.{name}")


def read_metadata(directory: Path) -> Metadata:
    """The checkpoint's index of tensors, chunks and files.

    Raises:
        UserError: no torch_dist checkpoint is there, it is damaged, or its metadata would run code.
    """
    path = directory / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _RestrictedUnpickler(file).load()
    except FileNotFoundError:
        raise UserError(
            f"{directory}: expected a Megatron torch_dist checkpoint (a folder with .metadata), "
            "found none; convert a Hugging Face folder with tools/hf_to_megatron.py"
        ) from None
    except _Refused as error:
        raise UserError(f"{path}: refused: {error}, which no checkpoint needs; do not load this folder") from None
    except OSError:
        raise
    except Exception as error:  # what the bytes of a damaged pickle ask for can fail in any way
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); write the checkpoint again") from None
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path}: expected checkpoint metadata, got {type(metadata).__name__}")
    try:
        whole = _is_whole(metadata)
    except (AttributeError, TypeError):  # a record that lacks a field, or holds something else in it
        whole = False
    if not whole:
        raise UserError(f"{path}: damaged: its records are not those of a checkpoint; write the checkpoint again")
    return metadata


def _is_whole(metadata: Metadata) -> bool:
    """Whether every record holds what its class says: a pickle sets fields without asking."""

    def sizes(value: object) -> bool:
        return isinstance(value, tuple) and all(type(number) is int for number in value)

    tensors = all(
        type(name) is str
        and (
            isinstance(entry, BytesStorageMetadata)
            or (
                isinstance(entry, TensorStorageMetadata)
                and isinstance(entry.properties.dtype, torch.dtype)
                and sizes(entry.size)
                and all(sizes(chunk.offsets) and sizes(chunk.sizes) for chunk in entry.chunks)
            )
        )
        for name, entry in metadata.state_dict_metadata.items()
    )
    return tensors and all(
        isinstance(index, MetadataIndex)
        and type(info.relative_path) is str
        and "\0" not in info.relative_path
        and type(info.offset) is type(info.length) is int
        and info.offset >= 0 <= info.length
        for index, info in metadata.storage_data.items()
    )

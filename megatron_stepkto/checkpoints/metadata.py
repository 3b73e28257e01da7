"""Reading a torch_dist checkpoint's ``.metadata`` without letting it run code.

``.metadata`` is a raw pickle: its author can make a reader execute anything. Only the plain data
classes of torch.distributed.checkpoint may be built from it; everything else is refused.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import read_json_object
from megatron_stepkto.checkpoints.unpickling import Allowed, RestrictedUnpickler, blame, read_plain

_DCP = "torch.distributed.checkpoint"


class _Marker:
    """Replaces the empty classes that Megatron-Core up to 0.15 left in a checkpoint with optimizer states."""


_ALLOWED: Allowed = {
    **dict.fromkeys(
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
    (f"{_DCP}.filesystem", "_StorageInfo"): None,
    **dict.fromkeys(
        (f"{_DCP}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
    ),
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): None,
    ("collections", "OrderedDict"): None,
    **dict.fromkeys(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath")),
    **dict.fromkeys(("torch", name) for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)),
    **dict.fromkeys(
        (("megatron.core.dist_checkpointing.strategies.torch", name) for name in ("MCoreMetadata", "MCoreSavePlan")),
        _Marker,
    ),
}


def check_format(directory: Path) -> None:
    """Look at the small files that Megatron-Core reads beside ``.metadata``: metadata.json and, up to 0.16, common.pt.

    Raises:
        UserError: one is missing, damaged, of another format, or would run code.
    """
    path = directory / "metadata.json"
    found = read_json_object(path)
    backends = found.get("sharded_backend"), found.get("common_backend", "torch")  # 0.19 names only the first
    if backends != ("torch_dist", "torch"):
        raise UserError(
            f"{path}: expected sharded_backend = 'torch_dist' and common_backend = 'torch', "
            f"got {backends[0]!r:.80} and {backends[1]!r:.80}; only torch_dist checkpoints are read"
        )
    path = directory / "common.pt"
    if path.exists() and not isinstance(read_plain(path), dict):
        raise UserError(f"{path}: damaged: expected a dict; write the checkpoint again")


def read_metadata(directory: Path) -> Metadata:
    """The checkpoint's index of tensors, chunks and files.

    Raises:
        UserError: there is no torch_dist checkpoint, it is damaged, or its metadata would run code.
    """
    path = directory / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = RestrictedUnpickler(file, _ALLOWED).load()
    except FileNotFoundError:
        raise UserError(
            f"{directory}: expected a Megatron torch_dist checkpoint (a folder with .metadata), "
            "found none; convert a Hugging Face folder with tools/hf_to_megatron.py"
        ) from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(f"{path}: {blame(error)}") from None
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path}: expected checkpoint metadata, got {type(metadata).__name__}")
    try:
        whole = _is_whole(metadata)
    except (AttributeError, TypeError):  # a record lacks a field, or holds another type in it
        whole = False
    if not whole:
        raise UserError(f"{path}: damaged: its records are not those of a checkpoint; write the checkpoint again")
    return metadata


def _is_whole(metadata: Metadata) -> bool:
    """Whether every record has the types that its class declares: a pickle sets fields unchecked."""

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

"""Reading a torch_dist checkpoint's ``.metadata`` without letting it run code.

``.metadata`` is a raw pickle: whoever writes it can have a reader execute anything. Only the plain data
classes of torch.distributed.checkpoint may be built from it; everything else is refused.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_stepkto.errors import UserError

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


class _RestrictedUnpickler(pickle.Unpickler):
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
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); write the checkpoint again") from None
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path}: expected checkpoint metadata, got {type(metadata).__name__}")
    return metadata

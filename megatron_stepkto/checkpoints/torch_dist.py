"""Megatron-Core's ``torch_dist`` checkpoint format, written and read without process groups.

A folder holds ``.metadata`` (which chunk of which tensor stands where), ``__0_0.distcp`` (the chunks, each a
``torch.save``d tensor, one behind another), ``common.pt`` and ``metadata.json``. Neither side ever holds more
than one chunk.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_stepkto.checkpoints.metadata import read_metadata
from megatron_stepkto.errors import UserError

DATA_FILE = "__0_0.distcp"


@dataclass(frozen=True)
class Chunk:
    """A part of the tensor ``key`` of ``shape``, at ``offset``."""

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor


def write_checkpoint(directory: Path, chunks: Iterable[Chunk], extra_state_keys: Iterable[str]) -> None:
    """Write chunks, in the order they come, as a torch_dist checkpoint.

    Args:
        directory: exists and is empty.
        extra_state_keys: modules' ``_extra_state`` entries; empty without Transformer Engine, but a strict
            load asks for them.
    """
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    with (directory / DATA_FILE).open("wb") as file:

        def append(index: MetadataIndex, value: Any) -> None:
            start = file.tell()
            buffer = io.BytesIO()
            torch.save(value, buffer)
            file.write(buffer.getbuffer())
            storage[index] = _StorageInfo(DATA_FILE, start, file.tell() - start)

        for chunk in chunks:
            entry = tensors.setdefault(
                chunk.key,
                TensorStorageMetadata(TensorProperties(dtype=chunk.tensor.dtype), torch.Size(chunk.shape), []),
            )
            assert isinstance(entry, TensorStorageMetadata)
            assert entry.properties.dtype == chunk.tensor.dtype, f"{chunk.key} has chunks of two dtypes"
            offset = torch.Size(chunk.offset)
            entry.chunks.append(ChunkStorageMetadata(offset, chunk.tensor.shape))
            # clone: torch.save writes the whole storage behind a view
            append(MetadataIndex(chunk.key, offset), chunk.tensor.clone(memory_format=torch.contiguous_format))
        for key in extra_state_keys:
            tensors[key] = BytesStorageMetadata()
            append(MetadataIndex(key), [None])
    torch.save({"iteration": 0, "content_metadata": {}}, directory / "common.pt")
    (directory / "metadata.json").write_text(
        json.dumps(
            {
                "sharded_backend": "torch_dist",
                "sharded_backend_version": 1,
                "common_backend": "torch",
                "common_backend_version": 1,
            }
        )
    )
    with (directory / ".metadata").open("wb") as file:
        pickle.dump(Metadata(tensors, planner_data=None, storage_data=storage, storage_meta=StorageMeta()), file)


class CheckpointReader:
    """Reads regions of a checkpoint's tensors, chunk by chunk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._metadata = read_metadata(directory)
        self._cache: tuple[MetadataIndex, Tensor] | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor (not of byte entries), optimizer state included."""
        return {
            key: tuple(entry.size)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def dtype(self, key: str) -> torch.dtype:
        return self._entry(key).properties.dtype

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{self.directory}: no tensor {key}")
        return entry

    def read(self, key: str, index: int | None = None, rows: int | None = None) -> Tensor:
        """The tensor ``key``, or its slice at ``index`` of the first (layer) axis, cut to ``rows`` leading rows.

        Raises:
            UserError: the chunks do not cover the region, or a file is missing or damaged.
        """
        entry = self._entry(key)
        full = tuple(entry.size)
        shape = full if index is None else full[1:]
        if rows is not None:
            shape = (rows, *shape[1:])
        lead = () if index is None else (index,)
        out = torch.empty(shape, dtype=entry.properties.dtype)
        filled = 0
        for chunk in entry.chunks:
            if index is not None and not chunk.offsets[0] <= index < chunk.offsets[0] + chunk.sizes[0]:
                continue
            starts, sizes = chunk.offsets[len(lead) :], chunk.sizes[len(lead) :]
            ends = [min(s + n, limit) for s, n, limit in zip(starts, sizes, shape, strict=True)]
            if any(end <= start for start, end in zip(starts, ends, strict=True)):
                continue
            tensor = self._load(MetadataIndex(key, chunk.offsets))
            if index is not None:
                tensor = tensor[index - chunk.offsets[0]]
            take = tuple(slice(0, end - start) for start, end in zip(starts, ends, strict=True))
            put = tuple(slice(start, end) for start, end in zip(starts, ends, strict=True))
            out[put] = tensor[take]
            filled += out[put].numel()
        if filled != out.numel():
            raise UserError(
                f"{self.directory}: {key}: chunks cover {filled} of {out.numel()} elements; "
                "the checkpoint is incomplete"
            )
        return out

    def _load(self, index: MetadataIndex) -> Tensor:
        if self._cache and self._cache[0] == index:
            return self._cache[1]
        info = self._metadata.storage_data[index]
        path = self.directory / info.relative_path
        try:
            with path.open("rb") as file:
                file.seek(info.offset)
                tensor: Tensor = torch.load(io.BytesIO(file.read(info.length)), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, pickle.UnpicklingError, EOFError) as error:
            raise UserError(
                f"{path}: cannot read {index.fqn} at byte {info.offset}: {error}; "
                "the file is missing or damaged, write the checkpoint again"
            ) from None
        self._cache = (index, tensor)
        return tensor

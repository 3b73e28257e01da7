"""Megatron-Core's ``torch_dist`` checkpoint format, written and read without process groups.

A folder holds ``.metadata`` (which chunk of which tensor is where), ``__0_0.distcp``, ``__0_1.distcp``, ... (the
chunks, each a file that ``torch.save`` makes of a tensor, one after another), ``common.pt`` and ``metadata.json``.
Only bytes are moved: no chunk is ever loaded, however large it is.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
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

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.checkpoints.checksums import checksum, crc32_of_parts
from megatron_stepkto.checkpoints.metadata import read_metadata
from megatron_stepkto.checkpoints.stream import Bytes, Files, split_rows
from megatron_stepkto.checkpoints.tensor_file import StoredTensor, TensorFile, TensorFileError, locate_tensor

FILE_BYTES = 4 * 2**30
CHUNK_BYTES = 2**29

Index = tuple[int, ...]

# --- writing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """``rows`` rows, from row ``row``, of the slice ``index`` of the stacked tensor ``key``."""

    key: str
    full_shape: tuple[int, ...]
    index: Index
    row: int
    rows: int
    dtype: torch.dtype

    @property
    def offset(self) -> tuple[int, ...]:
        return (*self.index, self.row, *(0 for _ in self.full_shape[len(self.index) + 1 :]))

    @property
    def file(self) -> TensorFile:
        shape = (*(1 for _ in self.index), self.rows, *self.full_shape[len(self.index) + 1 :])
        return TensorFile(self.dtype, shape)

    @property
    def row_bytes(self) -> int:
        return torch.Size(self.full_shape[len(self.index) + 1 :]).numel() * self.dtype.itemsize


def cut_slice(key: str, full_shape: tuple[int, ...], index: Index, dtype: torch.dtype) -> Iterator[Chunk]:
    """One slice of a stacked tensor as chunks of CHUNK_BYTES at most (at least one row)."""
    rows = full_shape[len(index)]
    step = max(1, CHUNK_BYTES // Chunk(key, full_shape, index, 0, rows, dtype).row_bytes)
    for row in range(0, rows, step):
        yield Chunk(key, full_shape, index, row, min(step, rows - row), dtype)


@dataclass(frozen=True)
class _Placed:
    chunk: Chunk
    file: str
    start: int
    data: int


class CheckpointWriter:
    """Places every chunk before the first byte is written, so that any worker may write any part."""

    def __init__(self, directory: Path, chunks: Iterable[Chunk]) -> None:
        self.directory = directory
        self._placed: list[_Placed] = []
        self._of_slice: dict[tuple[str, Index], list[_Placed]] = defaultdict(list)
        number = position = 0
        for chunk in chunks:
            length = chunk.file.length
            if position and position + length > FILE_BYTES:
                number, position = number + 1, 0
            placed = _Placed(chunk, f"__0_{number}.distcp", position, position + len(chunk.file.ends(0)[0]))
            self._placed.append(placed)
            self._of_slice[chunk.key, chunk.index].append(placed)
            position += length
        self._end = (f"__0_{number}.distcp", position)

    def blocks(self, key: str, index: Index, start: int, count: int) -> Iterator[tuple[int, int]]:
        """(first row, rows) of parts of a slice's rows that one write can store."""
        for placed in self._of_slice[key, index]:
            chunk = placed.chunk
            first, last = max(start, chunk.row), min(start + count, chunk.row + chunk.rows)
            if first < last:
                yield from split_rows(first, last - first, chunk.row_bytes)

    def write(self, files: Files, key: str, index: Index, row: int, data: Bytes) -> None:
        """Rows from ``row`` of a slice; they must be in one chunk (see ``blocks``)."""
        placed = next(p for p in self._of_slice[key, index] if p.chunk.row <= row < p.chunk.row + p.chunk.rows)
        files.write(self.directory / placed.file, placed.data + (row - placed.chunk.row) * placed.chunk.row_bytes, data)

    def finish(
        self, files: Files, parts: Mapping[tuple[str, Index], list[tuple[int, int, int]]], extra_state: Iterable[str]
    ) -> dict[str, tuple[int, int]]:
        """Write the frames of the chunks, and the folder's index.

        Args:
            parts: what was written of every slice: (row, CRC-32, bytes).
            extra_state: modules' ``_extra_state`` entries; empty without Transformer Engine, but required by a
                strict load.

        Returns:
            CRC-32 and length of every file by name.
        """
        tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        sums: dict[str, list[tuple[int, int]]] = defaultdict(list)
        ordered = {slice_: sorted(found) for slice_, found in parts.items()}
        for placed in self._placed:
            chunk = placed.chunk
            mine = [
                (crc, length)
                for row, crc, length in ordered[chunk.key, chunk.index]
                if chunk.row <= row < chunk.row + chunk.rows
            ]
            crc, length = crc32_of_parts(mine)
            assert length == chunk.file.num_bytes, f"{chunk.key}{chunk.index}: {length} bytes were written"
            before, after = chunk.file.ends(crc)
            path = self.directory / placed.file
            files.write(path, placed.start, before)
            files.write(path, placed.data + length, after)
            sums[placed.file] += [(checksum(before), len(before)), (crc, length), (checksum(after), len(after))]
            entry = tensors.setdefault(
                chunk.key, TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), torch.Size(chunk.full_shape), [])
            )
            assert isinstance(entry, TensorStorageMetadata)
            offset = torch.Size(chunk.offset)
            entry.chunks.append(ChunkStorageMetadata(offset, torch.Size(chunk.file.shape)))
            storage[MetadataIndex(chunk.key, offset)] = _StorageInfo(placed.file, placed.start, chunk.file.length)

        name, position = self._end
        empty = _saved([None])
        for key in extra_state:
            tensors[key] = BytesStorageMetadata()
            storage[MetadataIndex(key)] = _StorageInfo(name, position, len(empty))
            files.write(self.directory / name, position, empty)
            sums[name].append((checksum(empty), len(empty)))
            position += len(empty)
        backends = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        metadata = Metadata(tensors, planner_data=None, storage_data=storage, storage_meta=StorageMeta())
        for name, content in (
            ("common.pt", _saved({"iteration": 0, "content_metadata": {}})),
            ("metadata.json", json.dumps(backends).encode()),
            (".metadata", pickle.dumps(metadata)),
        ):
            files.write(self.directory / name, 0, content)
            sums[name] = [(checksum(content), len(content))]
        return {name: crc32_of_parts(found) for name, found in sums.items()}


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# --- reading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Box:
    """A chunk as another writer cut it: any block of the whole tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    info: _StorageInfo


class CheckpointReader:
    """Reads rows of a checkpoint's tensors, however they were cut into chunks."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._metadata = read_metadata(directory)
        self._boxes: dict[str, list[_Box]] = {}
        self._by_index: dict[tuple[str, int], dict[Index, list[_Box]]] = {}
        self._located: dict[tuple[str, int], StoredTensor] = {}

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

    def check(self, keys: Iterable[str]) -> list[str]:
        """Faults that keep these tensors from being read: missing parts, missing or damaged files.

        Checks every chunk's frame, not its numbers.
        """
        faults: list[str] = []
        unreadable: dict[tuple[str, str], list[str]] = defaultdict(list)
        handles: dict[str, int | OSError] = {}
        for key in keys:
            entry = self._entry(key)
            boxes = self._boxes[key] = self._find_boxes(key, entry)
            covered = sum(torch.Size(box.sizes).numel() for box in boxes)
            distinct = len({box.offsets for box in boxes}) == len(boxes)
            if covered != entry.size.numel() or not distinct:
                faults.append(
                    f"{self.directory}: {key}: chunks cover {covered} of {entry.size.numel()} elements; "
                    "the checkpoint is incomplete"
                )
            for box in boxes:
                reason = self._locate(box, entry.properties.dtype, handles)
                if reason:
                    unreadable[box.info.relative_path, reason].append(f"{key} at byte {box.info.offset}")
        for handle in handles.values():
            if isinstance(handle, int):
                os.close(handle)
        for (name, reason), found in unreadable.items():
            faults.append(
                f"{self.directory / name}: cannot read {', '.join(found)}: {reason}; "
                "the file is missing or damaged, write the checkpoint again"
            )
        return faults

    def _find_boxes(self, key: str, entry: TensorStorageMetadata) -> list[_Box]:
        boxes = []
        for chunk in entry.chunks:
            info = self._metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
            inside = len(chunk.offsets) == len(chunk.sizes) == len(entry.size) and all(
                start >= 0 and size >= 0 and start + size <= whole
                for start, size, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
            )
            if info is None or not inside:
                raise UserError(
                    f"{self.directory / '.metadata'}: damaged: the chunk of {key} at {tuple(chunk.offsets)} is "
                    "outside of its tensor, or no file is named for it; write the checkpoint again"
                )
            boxes.append(_Box(tuple(chunk.offsets), tuple(chunk.sizes), info))
        return boxes

    def _locate(self, box: _Box, dtype: torch.dtype, handles: dict[str, int | OSError]) -> str | None:
        """Record where a chunk's data begin; returns its fault, if any."""
        name, offset, length = box.info.relative_path, box.info.offset, box.info.length
        if Path(name).name != name or name in ("", ".", ".."):
            return "its file is outside of the folder: refused"
        if getattr(box.info, "transform_descriptors", None):
            return f"it was written with a transformation ({box.info.transform_descriptors}), which is not read"
        if name not in handles:
            try:
                handles[name] = os.open(self.directory / name, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                handles[name] = error
        handle = handles[name]
        if isinstance(handle, OSError):
            return str(handle.strerror)
        try:
            found = locate_tensor(handle, self.directory / name, offset, length)
        except TensorFileError as error:
            return str(error)
        if found.dtype != dtype or found.shape != box.sizes:
            return f"it holds {found.dtype} {found.shape}, the index says {dtype} {box.sizes}"
        self._located[name, offset] = found
        return None

    def read_rows(self, files: Files, key: str, index: Index, row: int, count: int, out: Bytes) -> None:
        """Fill ``out`` with rows of the slice ``index``; the key must have been checked (``check``).

        Args:
            out: [count * bytes per row].
        """
        entry = self._entry(key)
        itemsize = entry.properties.dtype.itemsize
        shape = tuple(entry.size)[len(index) :]
        columns = torch.Size(shape[1:]).numel()
        table = out.reshape(count, columns * itemsize)
        lead, filled = len(index), 0
        for box in self._boxes_at(key, index):
            start, rows = box.offsets[lead], box.sizes[lead]
            first, last = max(row, start), min(row + count, start + rows)
            if first >= last:
                continue
            # Only the last axis of a slice may be cut beside the rows: slices have one or two.
            left = box.offsets[lead + 1] if len(shape) > 1 else 0
            width = box.sizes[lead + 1] if len(shape) > 1 else 1
            number = 0
            for i, (at, size) in enumerate(zip(index, box.sizes[:lead], strict=True)):
                number = number * size + at - box.offsets[i]
            data = self._located[box.info.relative_path, box.info.offset]
            offset = data.offset + (number * rows + first - start) * width * itemsize
            target = table[first - row : last - row, left * itemsize : (left + width) * itemsize]
            if width == columns:
                files.read_into(data.path, offset, target.reshape(-1))
            else:
                block = np.empty((last - first) * width * itemsize, np.uint8)
                files.read_into(data.path, offset, block)
                target[:] = block.reshape(target.shape)
            filled += (last - first) * width
        if filled != count * columns:
            raise UserError(
                f"{self.directory}: {key}{list(index)}: chunks cover {filled} of {count * columns} elements of rows "
                f"{row} to {row + count}; the checkpoint is incomplete"
            )

    def _boxes_at(self, key: str, index: Index) -> list[_Box]:
        found = self._by_index.get((key, len(index)))
        if found is None:
            found = defaultdict(list)
            for box in self._boxes[key]:
                starts, sizes = box.offsets[: len(index)], box.sizes[: len(index)]
                for position in itertools.product(
                    *(range(start, start + size) for start, size in zip(starts, sizes, strict=True))
                ):
                    found[position].append(box)
            self._by_index[key, len(index)] = found
        return found.get(index, [])

"""Hugging Face -> Megatron torch_dist and back, bit for bit, without holding the model in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from megatron_stepkto.architectures.families import find_architecture
from megatron_stepkto.architectures.mapping import Entry
from megatron_stepkto.architectures.model_config import ModelConfig
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import write_json
from megatron_stepkto.base.model_folder import read_config
from megatron_stepkto.base.progress import warn
from megatron_stepkto.base.whole_folder import whole_folder
from megatron_stepkto.checkpoints.checksums import checksum, crc32_of_parts
from megatron_stepkto.checkpoints.huggingface import DTYPES, HFCheckpoint, HFWriter, read_companions
from megatron_stepkto.checkpoints.manifest import NAME as MANIFEST
from megatron_stepkto.checkpoints.manifest import FileSum, Manifest, missing_or_resized, read_manifest
from megatron_stepkto.checkpoints.slices import Slice, extra_state_keys, slices
from megatron_stepkto.checkpoints.stored_names import find_layout, find_weights
from megatron_stepkto.checkpoints.stream import (
    Buffers,
    Bytes,
    Files,
    Moved,
    Piece,
    all_finite,
    cast,
    move,
    split_rows,
)
from megatron_stepkto.checkpoints.torch_dist import CheckpointReader, CheckpointWriter, cut_slice

# Inside a Megatron folder: the Hugging Face config and tokenizer files, so that the way back needs nothing else.
COMPANIONS = "huggingface"
LORA_SETTINGS = "lora.json"  # inside a Megatron folder that holds adapters alone (adapter.py)
HEAD, EMBEDDING = "lm_head.weight", "embedding.word_embeddings.weight"
HF_TO_MEGATRON, MEGATRON_TO_HF = "hf_to_megatron", "megatron_to_hf"


@dataclass(frozen=True)
class Converted:
    """weight_bytes: size of the tensors that were written."""

    weight_bytes: int
    num_tensors: int


def read_model_config(directory: Path) -> tuple[ModelConfig, list[Entry]]:
    """Config and weight mapping of a Hugging Face folder (or of a Megatron folder's companions)."""
    hf_config = read_config(directory)
    architecture = find_architecture(hf_config, str(directory / "config.json"))
    try:
        config = architecture.read_config(hf_config)
    except KeyError as error:
        raise UserError(
            f"{directory / 'config.json'}: key {error} is missing; it is needed to build the model"
        ) from None
    return config, architecture.entries(config)


# --- the two sides, checked ----------------------------------------------------------------------------------


def _listed(names: set[str]) -> str:
    """At most 100 names: a config of another model can ask for thousands."""
    more = f", ... ({len(names) - 100} more)" if len(names) > 100 else ""
    return ", ".join(sorted(names)[:100]) + more


class Side(ABC):
    """One side of a conversion: a model whose weights are those of its config.

    weights: the folder with its weights and manifest, ``directory`` or an iteration in it. companions: the one with its
    config and tokenizer. dtypes: of every tensor, by its Hugging Face name.
    """

    directory: Path
    weights: Path
    companions: Path
    config: ModelConfig
    entries: list[Entry]
    slices: list[Slice]
    dtypes: dict[str, torch.dtype]

    def companion_files(self) -> dict[str, bytes]:
        """Config, tokenizer and chat template files."""
        return read_companions(self.companions)

    @abstractmethod
    def read(self, files: Files, piece: Piece, out: Bytes) -> None:
        """Fill ``out`` with a piece's rows."""

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every Hugging Face tensor."""
        return (tensor for slice_ in self.slices for tensor in slice_.tensors())

    @cached_property
    def row_bytes(self) -> dict[str, int]:
        return {name: torch.Size(shape[1:]).numel() * self.dtypes[name].itemsize for name, shape in self.tensors()}

    @property
    def num_bytes(self) -> int:
        return sum(shape[0] * self.row_bytes[name] for name, shape in self.tensors())

    def pieces(self, writer: CheckpointWriter | None = None) -> Iterator[Piece]:
        """The model in pieces; each is rows of one tensor and, in Megatron's slice, of one block of ``writer``."""
        for slice_ in self.slices:
            for run in slice_.entry.runs:
                name, rows = slice_.names[run.part], (run.target, run.count)
                blocks = writer.blocks(slice_.key, slice_.index, *rows) if writer else None
                for at, count in blocks or split_rows(*rows, self.row_bytes[name]):
                    yield Piece(name, run.source + at - run.target, slice_.key, slice_.index, at, count)


class HFSide(Side):
    """A Hugging Face folder whose weights are those of its config.

    Raises:
        UserError: they are not; names every fault that shows in the files' headers.
    """

    def __init__(self, directory: Path, *, one_dtype: bool = True) -> None:
        self.directory = self.weights = self.companions = directory
        self.checkpoint = HFCheckpoint(directory)
        self.config, self.entries = read_model_config(directory)
        self.slices = slices(self.entries)
        faults = [*self._name_faults(), *self._tensor_faults(one_dtype), *self._tied_faults()]
        if faults:
            raise UserError(f"{directory}: the weights are not those of its config.json; " + "; ".join(faults))
        if "auto_map" in read_config(directory):
            warn(f"{directory / 'config.json'}: auto_map names the author's own code, which is neither run nor copied")
        self.dtypes = {name: DTYPES[self.checkpoint.weights[name].dtype] for name, _ in self.tensors()}

    def read(self, files: Files, piece: Piece, out: Bytes) -> None:
        self.checkpoint.read_rows(files, piece.name, piece.row, out)

    def _name_faults(self) -> Iterator[str]:
        found = set(self.checkpoint.weights)
        expected = {name for slice_ in self.slices for name in slice_.names}
        extra = found - expected - ({HEAD} if self.config.tied else set())
        extra = {name for name in extra if not name.endswith("rotary_emb.inv_freq")}
        if expected - found:
            yield f"missing: {_listed(expected - found)}"
        if extra:
            yield f"not mapped: {_listed(extra)}"

    def _tied_faults(self) -> Iterator[str]:
        """A tied model may carry a copy of its embedding under the head's name, which is left out. It must be
        equal: transformers unties a different head, whatever config.json says."""
        head = self.checkpoint.weights.get(HEAD)
        name = next(s.names[0] for s in self.slices if s.key == EMBEDDING)
        words = self.checkpoint.weights.get(name)
        if not self.config.tied or head is None or words is None:
            return
        equal = (head.dtype, head.shape) == (words.dtype, words.shape)
        with Files() as files:
            for at, count in split_rows(0, words.shape[0], words.row_bytes) if equal and words.dtype in DTYPES else ():
                one, other = (np.empty(count * words.row_bytes, np.uint8) for _ in range(2))
                self.checkpoint.read_rows(files, HEAD, at, one)
                self.checkpoint.read_rows(files, name, at, other)
                equal = equal and np.array_equal(one, other)
        if not equal:
            yield (
                f"{HEAD} differs from {name}, although tie_word_embeddings is true; remove it from the weights, "
                "or set tie_word_embeddings to false"
            )

    def _tensor_faults(self, one_dtype: bool) -> Iterator[str]:
        """Checks each shape: wrong ones can fit when stacked. Checks that a stacked weight has one dtype."""
        dtypes: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for slice_ in self.slices:
            for name, shape in slice_.tensors():
                weight = self.checkpoint.weights.get(name)
                if weight is None:
                    continue
                if weight.shape != shape:
                    yield f"{name} has shape {weight.shape}, config.json asks for {shape}"
                if weight.dtype not in DTYPES:
                    yield f"{name} is {weight.dtype}, expected {', '.join(DTYPES)}; a quantised model cannot be trained"
                dtypes[slice_.key][weight.dtype].append(name)
        for found in dtypes.values():
            if len(found) > 1 and one_dtype:
                fewest = min(found, key=lambda dtype: len(found[dtype]))
                yield (
                    f"{', '.join(found[fewest])} is {fewest}, the same weight of other layers or heads is "
                    f"{', '.join(sorted(set(found) - {fewest}))}; save the model in one dtype"
                )


class MegatronSide(Side):
    """A torch_dist checkpoint whose weights are those of its companions' config.

    Raises:
        UserError: they are not; names every fault that shows in the index and the chunks' frames.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.weights = weights = find_weights(directory)
        if (weights / LORA_SETTINGS).is_file():
            raise UserError(
                f"{directory}: holds adapters alone ({LORA_SETTINGS}); the run's convert stage merges them into their "
                "base (convert/model) and writes them for PEFT (convert/adapter)"
            )
        self.reader = CheckpointReader(weights)
        companions = next((f / COMPANIONS for f in (weights, directory) if (f / COMPANIONS).is_dir()), None)
        if companions is None:
            raise UserError(
                f"{directory}: expected a folder {COMPANIONS}/ with config.json and tokenizer files beside the "
                "weights; copy them there from the model that the training started from"
            )
        self.companions = companions
        self.config, self.entries = read_model_config(companions)
        self.slices = slices(self.entries)
        self._layout = find_layout(self.slices, self.reader.shapes())
        if faults := [*self._layout.faults, *self._dtype_faults()]:
            raise UserError(
                f"{weights}: the weights are not those of {self.companions / 'config.json'}; " + "; ".join(faults)
            )
        if faults := self.reader.check(sorted(self._layout.stored)):
            raise UserError("; ".join(faults))
        self.dtypes = {
            name: self.reader.dtype(self._layout.places[slice_.key, slice_.index][0].key)
            for slice_ in self.slices
            for name in slice_.names
        }

    def read(self, files: Files, piece: Piece, out: Bytes) -> None:
        row_bytes = len(out) // piece.count
        for place in self._layout.places[piece.key, piece.index]:
            first, last = max(piece.at, place.first), min(piece.at + piece.count, place.first + place.rows)
            if first < last:
                part = out[(first - piece.at) * row_bytes : (last - piece.at) * row_bytes]
                self.reader.read_rows(files, place.key, place.index, first - place.first, last - first, part)

    def _dtype_faults(self) -> Iterator[str]:
        for key, stored in self._layout.by_key().items():
            found = {self.reader.dtype(name): name for name in sorted(stored)}
            if len(found) > 1:
                yield f"{key} is stored as {', '.join(f'{dtype} ({name})' for dtype, name in found.items())}"
            for dtype, name in found.items():
                if dtype not in DTYPES.values():
                    yield f"{name} is {dtype}, expected {', '.join(map(str, DTYPES.values()))}"


def checksums_by_tensor(moved: Iterable[Moved], *, written: bool = False) -> dict[str, tuple[int, int]]:
    """CRC-32 and bytes of every Hugging Face tensor as it was read, or written."""
    parts: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for done in moved:
        sums = (done.written_crc, done.written_bytes) if written else (done.read_crc, done.read_bytes)
        parts[done.piece.name].append((done.piece.row, *sums))
    return {name: crc32_of_parts((crc, length) for _, crc, length in sorted(found)) for name, found in parts.items()}


def tensor_checksums(side: Side, workers: int | None, title: str) -> dict[str, int]:
    """CRC-32 of every Hugging Face tensor of either side."""
    buffers = Buffers()
    with Files() as files:

        def work(piece: Piece) -> Moved:
            data = buffers.get(piece.count * side.row_bytes[piece.name])
            side.read(files, piece, data)
            crc = checksum(data)
            return Moved(piece, crc, data.size, crc, data.size)

        moved = move(side.pieces(), work, workers=workers, title=title, total_bytes=side.num_bytes)
    return {name: crc for name, (crc, _) in checksums_by_tensor(moved).items()}


# --- the two directions --------------------------------------------------------------------------------------


def transfer(
    side: Side,
    files: Files,
    pieces: Iterable[Piece],
    change: Callable[[Piece, Bytes], Bytes],
    dtypes: Mapping[str, torch.dtype],
    write: Callable[[Piece, Bytes], None],
    *,
    title: str,
    workers: int | None,
) -> list[Moved]:
    """Read, change and write every piece, a few MB at a time.

    Args:
        change: the bytes to write for those that were read. dtypes: of every tensor as it is written.

    Raises:
        UserError: numbers that are not finite, or that differ from the side's manifest; names all tensors.
    """
    not_finite = set[str]()
    buffers = Buffers()

    def work(piece: Piece) -> Moved:
        data = buffers.get(piece.count * side.row_bytes[piece.name])
        side.read(files, piece, data)
        read_crc = written_crc = checksum(data)
        result = change(piece, data)
        if result is not data:
            written_crc = checksum(result)
        if not all_finite(result, dtypes[piece.name]):
            not_finite.add(piece.name)
        if not not_finite:  # else nothing will be kept: only search for more
            write(piece, result)
        return Moved(piece, read_crc, data.size, written_crc, result.size)

    moved = move(pieces, work, workers=workers, title=title, total_bytes=side.num_bytes)
    check_finite(not_finite, side.directory)
    check_manifest(side.weights, checksums_by_tensor(moved))
    return moved


def hf_to_megatron(
    source: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    workers: int | None = None,
    *,
    replace: bool = True,
) -> Converted:
    """Convert a Hugging Face folder to a torch_dist checkpoint; ``target`` appears whole or not at all.

    Args:
        dtype: cast to this training dtype (None: keep, bit for bit).
        replace: see ``whole_folder``.
    Raises:
        UserError: an unknown architecture, a damaged file, or a missing, left-over, misshapen or non-finite weight
            (all named).
    """
    side = HFSide(source, one_dtype=dtype is None)
    check_sizes(side.weights)
    companions = side.companion_files()
    dtypes = {name: dtype or kept for name, kept in side.dtypes.items()}
    chunks = [
        chunk
        for slice_ in side.slices
        for chunk in cut_slice(slice_.key, slice_.entry.full_shape, slice_.index, dtypes[slice_.names[0]])
    ]
    weight_bytes = sum(chunk.file.num_bytes for chunk in chunks)
    framing = 4096 * (len(chunks) + 16 + sum(len(content) // 4096 + 1 for content in companions.values()))
    with whole_folder(target, weight_bytes + framing, replace=replace) as folder:
        writer = CheckpointWriter(folder, chunks)
        with Files() as files:
            moved = transfer(
                side,
                files,
                side.pieces(writer),
                lambda piece, data: cast(data, side.dtypes[piece.name], dtypes[piece.name]),
                dtypes,
                lambda piece, data: writer.write(files, piece.key, piece.index, piece.at, data),
                title=f"convert {source.name} to Megatron",
                workers=workers,
            )
            parts: dict[tuple[str, tuple[int, ...]], list[tuple[int, int, int]]] = defaultdict(list)
            for done in moved:
                parts[done.piece.key, done.piece.index].append((done.piece.at, done.written_crc, done.written_bytes))
            sums = writer.finish(files, parts, extra_state_keys(side.config))
            for name, content in companions.items():
                (folder / COMPANIONS / name).parent.mkdir(parents=True, exist_ok=True)
                files.write(folder / COMPANIONS / name, 0, content)
                sums[f"{COMPANIONS}/{name}"] = (checksum(content), len(content))
        write_manifest(folder, HF_TO_MEGATRON, dtype, checksums_by_tensor(moved), sums)
    return Converted(weight_bytes, len(dtypes))


def megatron_to_hf(source: Path, target: Path, workers: int | None = None, *, replace: bool = True) -> Converted:
    """Convert a torch_dist checkpoint (ours, or the trainer's at any layout) to a Hugging Face folder.

    Raises:
        UserError: a missing, left-over, misshapen or non-finite weight (all named), or a damaged file.
    """
    side, title = MegatronSide(source), f"convert {source.name} to Hugging Face"
    return write_hf(
        side, target, MEGATRON_TO_HF, lambda _, data: data, side.dtypes, title=title, workers=workers, replace=replace
    )


def write_hf(
    side: Side,
    target: Path,
    direction: str,
    change: Callable[[Piece, Bytes], Bytes],
    dtypes: Mapping[str, torch.dtype],
    *,
    title: str,
    workers: int | None = None,
    replace: bool = True,
) -> Converted:
    """Write what ``change`` makes of a side's tensors as a Hugging Face folder, which appears whole or not at all.

    See ``transfer`` for the arguments; direction: for the manifest.
    """
    check_sizes(side.weights)
    companions = side.companion_files()
    tensors = [(name, dtypes[name], shape) for name, shape in side.tensors()]
    weight_bytes = sum(torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in tensors)
    small = 2**20 + 512 * len(tensors) + sum(map(len, companions.values()))
    with whole_folder(target, weight_bytes + small, replace=replace) as folder:
        writer = HFWriter(folder, tensors)
        with Files() as files:

            def write(piece: Piece, data: Bytes) -> None:
                writer.write(files, piece.name, piece.row, data)

            moved = transfer(side, files, side.pieces(), change, dtypes, write, title=title, workers=workers)
            written = checksums_by_tensor(moved, written=True)
            sums = writer.finish(files, written, companions)
        write_manifest(folder, direction, None, written, sums)
    return Converted(weight_bytes, len(written))


def check_finite(not_finite: set[str], source: Path) -> None:
    """Raises UserError where there are tensors with NaN or infinite values."""
    if not_finite:
        verb = "holds" if len(not_finite) == 1 else "hold"
        raise UserError(
            f"{source}: {', '.join(sorted(not_finite))} {verb} NaN or infinite values (or values that overflow the "
            "dtype asked for); the checkpoint is broken"
        )


def check_sizes(source: Path) -> None:
    """Refuse a source that lost files, or parts of them, after a conversion wrote it. Where no weight is touched, as
    behind the last one, only the manifest tells."""
    manifest = read_manifest(source)
    if manifest is not None and (faults := missing_or_resized(source, manifest)):
        raise UserError(
            f"{'; '.join(faults)}; the folder is damaged, write it again (if you changed these files on purpose, "
            f"remove {source / MANIFEST})"
        )


def check_manifest(source: Path, tensors: dict[str, tuple[int, int]]) -> None:
    """Refuse a source that was damaged after a conversion wrote it: its manifest has every tensor's checksum."""
    manifest = read_manifest(source)
    if manifest is None or manifest.cast is not None:
        return
    damaged = [name for name, (crc, _) in sorted(tensors.items()) if manifest.tensors.get(name, crc) != crc]
    if damaged:
        raise UserError(
            f"{source}: {', '.join(damaged)}: the bytes differ from the checksums in {MANIFEST}; the folder "
            f"is damaged, write it again (if you changed these weights on purpose, remove its {MANIFEST})"
        )


def write_manifest(
    folder: Path,
    direction: str,
    dtype: torch.dtype | None,
    tensors: dict[str, tuple[int, int]],
    sums: dict[str, tuple[int, int]],
) -> None:
    """Write the manifest of a folder. tensors, sums: CRC-32 and bytes of every tensor, and of every file."""
    cast_to = str(dtype).removeprefix("torch.") if dtype else None
    manifest = Manifest(
        direction=direction,
        cast=cast_to,
        files={name: FileSum(bytes=length, crc32=crc) for name, (crc, length) in sorted(sums.items())},
        tensors={name: crc for name, (crc, _) in sorted(tensors.items())},
    )
    write_json(folder / MANIFEST, manifest.model_dump())

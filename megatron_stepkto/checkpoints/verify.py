"""Whether two folders hold the same model, bit for bit, and whether a folder is unchanged since it was written."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.model_folder import CONFIG, read_config
from megatron_stepkto.checkpoints.convert import (
    COMPANIONS,
    HF_TO_MEGATRON,
    HFSide,
    MegatronSide,
    Side,
    tensor_checksums,
)
from megatron_stepkto.checkpoints.huggingface import read_companions
from megatron_stepkto.checkpoints.manifest import NAME, damaged_files, missing_or_resized, read_manifest
from megatron_stepkto.checkpoints.stored_names import find_weights
from megatron_stepkto.checkpoints.stream import Buffers, Files, Moved, Piece, move


@dataclass
class _Difference:
    rows: int = 0
    elements: int = 0
    first_row: int = field(default=2**63)


def verify(hf: Path, megatron: Path, workers: int | None = None) -> list[str]:
    """Differences between a Hugging Face folder and a Megatron one, as lines; empty when they hold the same model.

    Compares configs, tokenizers and the other files that travel with a model, dtypes and every bit of every tensor
    (except rows that pad the vocabulary), and every file of either folder with its manifest, if it has one.

    Raises:
        UserError: one of the folders is damaged or incomplete; names all faults.
    """
    faults = [
        fault
        for folder in (hf, find_weights(megatron))
        if (manifest := read_manifest(folder)) is not None
        for fault in damaged_files(folder, manifest)
    ]
    try:
        ours, theirs = HFSide(hf), MegatronSide(megatron)
    except UserError as error:
        raise UserError("; ".join([str(error), *faults])) from None
    faults += _companion_faults(ours.companions, theirs.companions)
    if [s.shapes for s in ours.slices] != [s.shapes for s in theirs.slices]:
        return faults
    other_dtype = {
        name: f"{name} is {dtype} in {hf.name}, {theirs.dtypes[name]} in {megatron.name}"
        for name, dtype in ours.dtypes.items()
        if dtype != theirs.dtypes[name]
    }
    differences: dict[str, _Difference] = {}
    lock, left, right = threading.Lock(), Buffers(), Buffers()
    with Files() as files:

        def work(piece: Piece) -> Moved:
            size = piece.count * ours.row_bytes[piece.name]
            mine, other = left.get(size), right.get(size)
            ours.read(files, piece, mine)
            theirs.read(files, piece, other)
            if not np.array_equal(mine, other):
                unequal = (mine != other).reshape(piece.count, -1, ours.dtypes[piece.name].itemsize).any(axis=2)
                with lock:
                    found = differences.setdefault(piece.name, _Difference())
                    found.rows += int(unequal.any(axis=1).sum())
                    found.elements += int(unequal.sum())
                    found.first_row = min(found.first_row, piece.row + int(unequal.any(axis=1).argmax()))
            return Moved(piece, 0, size, 0, size)

        move(
            (piece for piece in ours.pieces() if piece.name not in other_dtype),
            work,
            workers=workers,
            title=f"compare {hf.name} with {megatron.name}",
            total_bytes=ours.num_bytes,
        )
    faults += other_dtype.values()
    for name, found in sorted(differences.items()):
        shape = ours.checkpoint.weights[name].shape
        faults.append(
            f"{name} {list(shape)}: {found.elements} elements in {found.rows} rows differ, "
            f"first in row {found.first_row}"
        )
    return faults


# The keys of config.json that a conversion sets to the dtype of the weights, which is compared by itself.
_REWRITTEN = ("dtype", "torch_dtype")


def _companion_faults(one: Path, other: Path) -> list[str]:
    """Differences between the files that travel with a model, of which a conversion changes only config.json."""
    files, others = read_companions(one), read_companions(other)
    faults = []
    for name in sorted(files.keys() | others.keys()):
        if name not in files or name not in others:
            here, there = (one, other) if name in files else (other, one)
            faults.append(f"{here / name}: has no counterpart in {there}")
        elif name == CONFIG:
            if changed := _changed_keys(read_config(one), read_config(other)):
                faults.append(f"{one / name} and {other / name} differ: {', '.join(changed)}")
        elif files[name] != others[name]:
            faults.append(f"{one / name} and {other / name} differ")
    return faults


def _changed_keys(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Of two config.json. ``auto_map`` is not copied; null is not the same as absent, which has a default."""
    return [
        f"{key}: {' / '.join(f'{each[key]!r:.80}' if key in each else 'absent' for each in (one, other))}"
        for key in sorted((one.keys() | other.keys()) - {"auto_map", *_REWRITTEN})
        if key not in one or key not in other or one[key] != other[key]
    ]


def is_finished(source: Path, target: Path, direction: str, workers: int | None = None) -> bool:
    """Whether ``target`` is the whole result of converting ``source`` as it is now. Reads the source."""
    manifest = read_manifest(target)
    if manifest is None or manifest.direction != direction or manifest.cast is not None:
        return False
    if missing_or_resized(target, manifest):
        return False
    side: Side = HFSide(source) if direction == HF_TO_MEGATRON else MegatronSide(source)
    if _companion_faults(side.companions, target / COMPANIONS if direction == HF_TO_MEGATRON else target):
        return False
    return tensor_checksums(side, workers, f"compare {source.name} with {NAME}") == manifest.tensors

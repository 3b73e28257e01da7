"""Low-rank adapters outside of a training: PEFT's folder, written from a checkpoint, read, and merged into its base.

PEFT keeps A [rank, in] and B [out, rank] of each Hugging Face matrix W, and computes W x + alpha / rank * B A x.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from megatron_stepkto.architectures.adapters import ADAPTER as CHILD
from megatron_stepkto.architectures.adapters import AdaptedLinear, adapted_linears, describe_targets
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import flush_tree, read_json, read_json_object
from megatron_stepkto.base.whole_folder import whole_folder
from megatron_stepkto.checkpoints.convert import (
    COMPANIONS,
    LORA_SETTINGS,
    Converted,
    HFSide,
    check_finite,
    read_model_config,
    write_hf,
)
from megatron_stepkto.checkpoints.huggingface import ADAPTER, read_header
from megatron_stepkto.checkpoints.stream import Bytes, Files, Piece
from megatron_stepkto.checkpoints.torch_dist import CheckpointReader
from megatron_stepkto.recipe.keys import LoRA

WEIGHTS = "adapter_model.safetensors"
MERGE = "merge"
_PREFIX = "base_model.model."
# Settings of PEFT with which an adapter is more than alpha / rank * B A, and their values with which it is not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),  # an adapter of some tokens alone
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # the others change the base, too
}


class Trained(BaseModel):
    """``LORA_SETTINGS``: what a checkpoint's adapters belong to. base: hash of the base model's folder."""

    lora: LoRA
    base: str


@dataclass(frozen=True)
class PeftAdapter:
    """A folder that PEFT wrote or reads."""

    directory: Path
    rank: int
    alpha: float
    names: frozenset[str]

    def factors(self, name: str, shape: tuple[int, int], rank: int) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] of a Hugging Face matrix.

        Args:
            name: of the module, ``model.layers.0.self_attn.q_proj``. shape: (out, in) of its matrix.

        Raises:
            UserError: the folder has none for this matrix, or of another shape.
        """
        found = []
        with safe_open(self.directory / WEIGHTS, framework="pt") as file:
            for letter, expected in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
                key = f"{_PREFIX}{name}.lora_{letter}.weight"
                if name not in self.names:
                    raise UserError(f"{self.directory / WEIGHTS}: holds no adapter of {name}; expected {key}")
                if (got := tuple(file.get_slice(key).get_shape())) != expected:
                    raise UserError(f"{self.directory / WEIGHTS}: {key} has shape {got}, expected {expected}")
                found.append(file.get_tensor(key))
        return found[0], found[1]


def read_adapter(directory: Path) -> PeftAdapter:
    """Read the settings and names of a PEFT folder.

    Raises:
        UserError: it is not one, or its adapter is not a plain LoRA (names every setting).
    """
    settings = read_json_object(directory / ADAPTER)
    faults = [
        f"{key} = {settings[key]!r:.60} is not supported, expected {plain[0]!r}"
        for key, plain in _PLAIN.items()
        if settings.get(key) not in plain
    ]
    if settings.get("peft_type") != "LORA":
        faults.append(f"peft_type = {settings.get('peft_type')!r:.60}: expected LORA")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        faults.append(f"r = {rank!r:.60}: expected a whole number, 1 or more")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < float("inf"):
        faults.append(f"lora_alpha = {alpha!r:.60}: expected a number above 0")
    if faults:
        raise UserError(f"{directory / ADAPTER}: " + "; ".join(faults))
    if not (directory / WEIGHTS).is_file():
        raise UserError(f"{directory}: expected {WEIGHTS}, found none; save the adapter with safetensors")
    keys = set(read_header(directory / WEIGHTS))
    names = {key.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for key in keys if key.endswith(".lora_A.weight")}
    expected = {f"{_PREFIX}{name}.lora_{letter}.weight" for name in names for letter in "AB"}
    if odd := sorted(keys ^ expected):
        raise UserError(f"{directory / WEIGHTS}: not a plain LoRA's tensors, or incomplete: {', '.join(odd[:5])}")
    return PeftAdapter(directory, rank, float(alpha), frozenset(names))  # type: ignore[arg-type]


def check_adapter(adapter: PeftAdapter, linears: Mapping[str, AdaptedLinear], lora: LoRA) -> None:
    """Check that an adapter is one that ``train.lora`` describes: all of it is trained further, and scaled alike.

    Raises:
        UserError: names every key to change.
    """
    names = {
        linear.hf_name(matrix, index)
        for linear in linears.values()
        for matrix in linear.matrices
        for index in linear.entry.indices()
    }
    faults = []
    if adapter.rank != lora.rank:
        faults.append(f"its rank is {adapter.rank}, train.lora.rank is {lora.rank}")
    if adapter.alpha != lora.alpha:
        faults.append(f"its alpha is {adapter.alpha:g}, train.lora.alpha is {lora.alpha:g}")
    if names != adapter.names:
        own = sorted({name.rpartition(".")[2] for name in adapter.names})
        faults.append(
            f"it adapts {', '.join(own)} in {len(adapter.names)} matrices, train.lora.targets "
            f"{', '.join(describe_targets(linears))} in {len(names)}"
        )
    if faults:
        raise UserError(f"{adapter.directory}: " + "; ".join(faults) + "; make them equal")


def export_adapter(source: Path, target: Path, base: Path) -> None:
    """Write the adapters of a checkpoint, saved at any layout, as a PEFT folder.

    Args:
        source: of a training with ``train.lora``. base: the Hugging Face folder of the model they belong to.

    Raises:
        UserError: an adapter is missing, left over, or not finite.
    """
    lora = Trained.model_validate(read_json(source / LORA_SETTINGS)).lora
    _, entries = read_model_config(source / COMPANIONS)
    linears = adapted_linears(entries, lora.targets)
    reader = CheckpointReader(source)
    expected = {
        f"{linear.key}.{CHILD}.{matrix.target}.{letter}"
        for linear in linears.values()
        for matrix in linear.matrices
        for letter in "ab"
    }
    if odd := sorted(expected ^ reader.shapes().keys()):
        raise UserError(
            f"{source}: not the adapters of its {LORA_SETTINGS}; missing or left over: {', '.join(odd[:10])}"
        )
    if faults := reader.check(sorted(expected)):
        raise UserError("; ".join(faults))
    tensors = {}
    for linear in linears.values():
        for matrix in linear.matrices:
            key, order = f"{linear.key}.{CHILD}.{matrix.target}", linear.rows(matrix)
            for index in linear.entry.indices():
                name = f"{_PREFIX}{linear.hf_name(matrix, index)}"
                a, b = (_read(reader, f"{key}.{letter}", index) for letter in "ab")
                tensors[f"{name}.lora_A.weight"] = a
                tensors[f"{name}.lora_B.weight"] = torch.empty_like(b).index_copy_(0, order, b)
    check_finite({name for name, tensor in tensors.items() if not tensor.isfinite().all()}, source)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": describe_targets(linears),
        "bias": "none",
        "inference_mode": True,
    }
    content = save(tensors, metadata={"format": "pt"})
    with whole_folder(target, len(content)) as folder:
        (folder / WEIGHTS).write_bytes(content)
        (folder / ADAPTER).write_text(json.dumps(settings, indent=2) + "\n")
        flush_tree(folder)


def _read(reader: CheckpointReader, key: str, index: tuple[int, ...]) -> Tensor:
    """A matrix of a stacked tensor, which has been checked."""
    rows, columns = reader.shapes()[key][len(index) :]
    matrix = torch.empty(rows, columns, dtype=reader.dtype(key))
    with Files() as files:
        reader.read_rows(files, key, index, 0, rows, matrix.view(torch.uint8).numpy().reshape(-1))
    return matrix


def merge_adapter(base: Path, adapter: Path, target: Path, dtype: torch.dtype | None = None) -> Converted:
    """Write base + alpha / rank * B A as a Hugging Face folder; ``target`` appears whole or not at all.

    The sum is computed in float32 and rounded once, a few rows at a time: the model is never whole in memory.

    Args:
        base: the Hugging Face folder. adapter: a PEFT folder.
        dtype: of the result, to which the base is cast first, as for training; None: each weight's own.

    Raises:
        UserError: either is damaged, or the adapter is not one of this model.
    """
    side, found = HFSide(base, one_dtype=False), read_adapter(adapter)
    shapes = dict(side.tensors())
    if unknown := sorted(name for name in found.names if f"{name}.weight" not in shapes):
        raise UserError(
            f"{adapter / WEIGHTS}: adapts {', '.join(unknown[:5])}, which {base} lacks: it belongs to another model"
        )
    scale = found.alpha / found.rank
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name in found.names:
        rows, columns = shapes[f"{name}.weight"]
        a, b = found.factors(name, (rows, columns), found.rank)
        factors[f"{name}.weight"] = a, b
    check_finite({name for name, pair in factors.items() if not all(each.isfinite().all() for each in pair)}, adapter)
    dtypes = {name: dtype or kept for name, kept in side.dtypes.items()}

    def merged(piece: Piece, data: Bytes) -> Bytes:
        rows = torch.from_numpy(data).view(side.dtypes[piece.name]).to(dtypes[piece.name])
        if pair := factors.get(piece.name):
            a, b = (factor.float() for factor in pair)
            rows = rows.view(piece.count, -1).float()
            rows = (rows + scale * (b[piece.row : piece.row + piece.count] @ a)).to(dtypes[piece.name])
        return rows.reshape(-1).view(torch.uint8).numpy()

    return write_hf(side, target, MERGE, merged, dtypes, title=f"merge {adapter.name} into {base.name}")

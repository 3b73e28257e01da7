"""Dry run of a conversion from a config.json alone: the mapping, and what each rank of a layout would hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_stepkto.architectures.layout import expert_choices, layout_faults
from megatron_stepkto.architectures.sharding import model_parameters, stage_layers, stage_parameters
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.model_folder import read_config
from megatron_stepkto.checkpoints.convert import COMPANIONS, read_model_config
from megatron_stepkto.checkpoints.slices import Slice, slices
from megatron_stepkto.recipe.keys import Parallel


def dry_run(source: Path, parallel: Parallel) -> str:
    """The mapping and the bytes per rank, as text.

    Args:
        source: a config.json, a Hugging Face folder, or a Megatron folder with companions; weights are not needed.

    Raises:
        UserError: no config, an unsupported one, or a layout in which the model cannot be split (all reasons).
    """
    folder = source.parent if source.name == "config.json" else source
    if not (folder / "config.json").is_file() and (folder / COMPANIONS).is_dir():
        folder = folder / COMPANIONS
    config, entries = read_model_config(folder)
    faults = layout_faults(config, parallel)
    if faults:
        # name this command's options, not the recipe's keys
        raise UserError("\n".join(fault.message.replace("train.parallel.", "--") for fault in faults))
    dtype = _dtype(read_config(folder))
    total = model_parameters(entries)
    lines = [
        f"{folder}: {config.num_layers} layers, hidden size {config.hidden_size}, {config.num_heads} heads in "
        f"{config.num_kv_heads} groups, vocabulary {config.vocab_size}",
        f"{total:,} parameters, {total * dtype.itemsize / 1e9:,.2f} GB in {str(dtype).removeprefix('torch.')}",
        "",
        "Megatron-Core's tensor, its shape, and the Hugging Face tensors in it:",
        *_mapping(slices(entries)),
        "",
        f"--tensor {parallel.tensor} --pipeline {parallel.pipeline}"
        + (f" --expert {parallel.expert}" if config.experts else "")
        + (f" --virtual-pipeline {parallel.virtual_pipeline}" if parallel.virtual_pipeline else "")
        + ": weights of one rank of each pipeline stage",
    ]
    for stage in range(parallel.pipeline):
        held = stage_parameters(config, entries, parallel, stage)
        spans = ((numbers[0], numbers[-1]) for numbers in stage_layers(config, parallel, stage))
        layers = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in spans)
        lines.append(
            f"  stage {stage}: layers {layers}: {held.total:,} parameters, "
            f"{held.total * dtype.itemsize:,} bytes ({held.total * dtype.itemsize / 1e9:.2f} GB)"
        )
    if config.experts and parallel.tensor > 1 and parallel.expert == 1:
        choices = [d for d in expert_choices(config, parallel.tensor) if d > 1]
        if choices:
            lines.append(
                f"  every rank holds all {config.experts.number} experts of its layers: --tensor does not split them; "
                f"--expert (one of {', '.join(map(str, choices))}) distributes them"
            )
    return "\n".join(lines) + "\n"


def _dtype(config: dict[str, object]) -> torch.dtype:
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"config.json: dtype = {name!r}: expected float32, float16 or bfloat16")
    return dtype


def _mapping(all_slices: list[Slice]) -> Iterator[str]:
    """One line per Hugging Face tensor name, with ``{0..79}`` for the layers (and experts)."""
    firsts: dict[str, Slice] = {}
    lasts: dict[str, Slice] = {}
    for slice_ in all_slices:
        firsts.setdefault(slice_.key, slice_)
        lasts[slice_.key] = slice_
    for key, first in firsts.items():
        yield f"  {key} {list(first.entry.full_shape)}"
        for part, (name, shape) in enumerate(first.tensors()):
            runs = [run for run in first.entry.runs if run.part == part]
            rows = f"rows {runs[0].target} to {runs[0].target + runs[0].count - 1}" if len(first.names) > 1 else "whole"
            if len(runs) > 1:
                rows += f", ... in {len(runs)} runs of {runs[0].count}"
            yield f"    <- {_ranged(name, lasts[key].names[part])} {list(shape)}: {rows}"


def _ranged(first: str, last: str) -> str:
    """Two names that differ in numbers only, as one with ranges."""
    ends = iter(re.findall(r"\d+", last))

    def both(found: re.Match[str]) -> str:
        end = next(ends)
        return found[0] if end == found[0] else f"{{{found[0]}..{end}}}"

    return re.sub(r"\d+", both, first)

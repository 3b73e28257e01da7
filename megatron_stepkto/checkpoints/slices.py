"""The pieces that a conversion is cut into: which rows of which Hugging Face tensor stand where in Megatron's keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_stepkto.checkpoints.architecture import Entry, ModelConfig, is_per_layer

_PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class Run:
    part: int
    source: int
    target: int
    count: int


@dataclass(frozen=True)
class Slice:
    entry: Entry
    key: str
    full_shape: tuple[int, ...]
    index: tuple[int, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    runs: tuple[Run, ...]
    pads_rows: bool


def slices(entries: list[Entry], config: ModelConfig) -> Iterator[Slice]:
    found = []
    for entry in entries:
        shape = entry.shape(config)
        lead = (config.num_layers,) if is_per_layer(entry) else ()
        shapes = tuple(tuple(p.shape) for p in entry.to_hf(torch.empty(shape, device="meta"), config))
        ids, start = [], 0
        owner = []
        for n, s in enumerate(shapes):
            ids.append(torch.arange(start, start + s[0]).reshape(s[0], *(1 for _ in s[1:])))
            owner += [(n, i) for i in range(s[0])]
            start += s[0]
        runs: list[Run] = []
        for at, i in enumerate(entry.to_megatron(ids, config).flatten().tolist()):
            n, row = owner[i]
            if runs and runs[-1].part == n and runs[-1].source + runs[-1].count == row:
                runs[-1] = Run(n, runs[-1].source, runs[-1].target, runs[-1].count + 1)
            else:
                runs.append(Run(n, row, at, 1))
        for layer in range(lead[0] if lead else 1):
            found.append(
                Slice(
                    entry,
                    entry.key,
                    (*lead, *shape),
                    (layer,) if lead else (),
                    tuple(entry.hf_names(layer)),
                    shapes,
                    tuple(runs),
                    entry.key in _PADDED,
                )
            )
    yield from sorted(found, key=lambda s: s.index)


_EXTRA_STATE_MODULES = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


def extra_state_keys(config: ModelConfig) -> list[str]:
    return [
        f"decoder.layers.{module}._extra_state/shard_{layer}_{config.num_layers}"
        for module in _EXTRA_STATE_MODULES
        for layer in range(config.num_layers)
    ]

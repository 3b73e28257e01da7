"""How weights map: a Megatron-Core key is stacked from slices, and a slice's rows are rows of Hugging Face tensors.

Megatron-Core stacks a weight over layers, and an expert's over layers and experts
(``decoder.layers.mlp.linear_fc1.weight`` is [L, 2F, H], ``decoder.layers.mlp.experts.experts.linear_fc1.weight``
[L, E, 2F, H]). An ``Entry`` maps every slice of one such key to one or more Hugging Face tensors, by runs of rows.
Both directions, and both ways of streaming (by tensor or by slice), follow from the runs. They only copy bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Run:
    """``count`` rows of Hugging Face tensor number ``part``, from its row ``source``, that begin at row ``target`` of
    the Megatron slice."""

    part: int
    source: int
    target: int
    count: int


@dataclass(frozen=True)
class Entry:
    """One Megatron-Core key and the Hugging Face tensors it is made of.

    Attributes:
        key: Megatron-Core's name.
        lead: the axes over which slices are stacked: (), (layers,) or (layers, experts).
        shape: of one slice.
        hf: the tensors of one slice, with ``{layer}`` and ``{expert}`` for the slice's index.
        runs: in the order of ``target``; they cover every row of the slice and of the tensors once.
        pads_rows: whether Megatron-Core may hold more rows (vocabulary padding for tensor parallelism).
        aliases: other names that Megatron-Core's module specs give the same weight.
    """

    key: str
    lead: tuple[int, ...]
    shape: tuple[int, ...]
    hf: tuple[str, ...]
    runs: tuple[Run, ...]
    pads_rows: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def full_shape(self) -> tuple[int, ...]:
        return (*self.lead, *self.shape)

    def indices(self) -> Iterator[tuple[int, ...]]:
        """The index of every slice: (), or (layer,), or (layer, expert)."""
        return itertools.product(*map(range, self.lead))

    def hf_names(self, index: tuple[int, ...]) -> list[str]:
        values = dict(zip(("layer", "expert"), index, strict=False))
        return [name.format(**values) for name in self.hf]

    def hf_shapes(self) -> list[tuple[int, ...]]:
        rows = [sum(run.count for run in self.runs if run.part == part) for part in range(len(self.hf))]
        return [(count, *self.shape[1:]) for count in rows]


def same(
    key: str, hf: str, *full_shape: int, stacked: int = 0, pads_rows: bool = False, aliases: tuple[str, ...] = ()
) -> Entry:
    """One tensor, unchanged; the first ``stacked`` axes of ``full_shape`` are layers and experts."""
    lead, shape = full_shape[:stacked], full_shape[stacked:]
    return Entry(key, lead, shape, (hf,), (Run(0, 0, 0, shape[0]),), pads_rows, aliases)


def gate_up(key: str, gate: str, up: str, *full_shape: int) -> Entry:
    """Gate and up projection, one above the other: the last two axes of ``full_shape`` are 2F and H."""
    lead, shape = full_shape[:-2], full_shape[-2:]
    half = shape[0] // 2
    return Entry(key, lead, shape, (gate, up), (Run(0, 0, 0, half), Run(1, 0, half, half)))


def qkv(
    key: str, hf: tuple[str, str, str], *, layers: int, groups: int, heads: int, head_dim: int, columns: int | None
) -> Entry:
    """Query, key and value by group: for each key-value head its query heads, then its key, then its value.

    Args:
        columns: the hidden size; None for a bias.
    """
    queries = heads // groups * head_dim
    per_group = queries + 2 * head_dim
    runs = []
    for group in range(groups):
        start = group * per_group
        runs += [
            Run(0, group * queries, start, queries),
            Run(1, group * head_dim, start + queries, head_dim),
            Run(2, group * head_dim, start + queries + head_dim, head_dim),
        ]
    shape = (groups * per_group,) if columns is None else (groups * per_group, columns)
    return Entry(key, (layers,), shape, hf, tuple(runs))

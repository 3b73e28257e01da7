"""Parameters that one rank holds, counted from an architecture's declaration; ``megatron/dry_run.py`` checks them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_stepkto.architectures.mapping import Entry
from megatron_stepkto.architectures.model_config import ModelConfig
from megatron_stepkto.recipe.keys import Parallel

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
# Megatron-Core splits these over tensor-parallel ranks: columns (output features) along dimension 0, rows
# (input features) along dimension 1. Everything else is whole on every rank.
_COLUMN = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias")
_ROW = ("linear_proj.weight", "linear_fc2.weight")
# A DDP bucket under the distributed optimizer is padded so that every shard is equal and 128-element aligned.
_BUCKET_MULTIPLE = 128


def padded_vocab_size(words: int, tensor_parallel: int) -> int:
    """Rows of the embedding over all tensor-parallel ranks."""
    return -(-words // tensor_parallel) * tensor_parallel


@dataclass(frozen=True)
class StageParameters:
    """Elements on one rank of a pipeline stage.

    chunks: per model chunk (one, or one per virtual stage). experts: of these, the experts'. embedding, head: of
    these, the vocabulary's rows.
    """

    chunks: tuple[int, ...]
    experts: tuple[int, ...]
    embedding: int
    head: int

    @property
    def total(self) -> int:
        return sum(self.chunks)


def stage_layers(config: ModelConfig, parallel: Parallel, stage: int) -> list[list[int]]:
    """Layer numbers of each chunk of a stage: chunk v of stage p holds consecutive layers from (v P + p) n on."""
    virtual = parallel.virtual_pipeline or 1
    size = config.num_layers // (parallel.pipeline * virtual)
    starts = [(chunk * parallel.pipeline + stage) * size for chunk in range(virtual)]
    return [list(range(start, start + size)) for start in starts]


def rank_shape(entry: Entry, parallel: Parallel) -> tuple[int, ...]:
    """One rank's part of an entry (of one layer where it is stacked over layers)."""
    of_expert = len(entry.lead) == 2
    tensor, shape = parallel.expert_tensor if of_expert else parallel.tensor, list(entry.shape)
    if entry.key in (EMBEDDING, HEAD):
        shape[0] = padded_vocab_size(shape[0], tensor) // tensor
    elif entry.key.endswith(_COLUMN):
        shape[0] //= tensor
    elif entry.key.endswith(_ROW):
        shape[1] //= tensor
    return (entry.lead[1] // parallel.expert, *shape) if of_expert else tuple(shape)


def stage_parameters(config: ModelConfig, entries: list[Entry], parallel: Parallel, stage: int) -> StageParameters:
    """Elements of every chunk that a rank of pipeline stage ``stage`` holds; equal on all its tensor ranks."""
    sizes = {entry.key: math.prod(rank_shape(entry, parallel)) for entry in entries}
    per_layer = sum(sizes[entry.key] for entry in entries if entry.lead)
    experts_per_layer = sum(sizes[entry.key] for entry in entries if len(entry.lead) == 2)
    first, last = stage == 0, stage == parallel.pipeline - 1
    layers = [len(numbers) for numbers in stage_layers(config, parallel, stage)]
    chunks = [per_layer * count for count in layers]
    embedding = sizes[EMBEDDING] if first else 0
    head = (sizes[EMBEDDING] if config.tied else sizes[HEAD]) if last else 0
    if first and last and config.tied:
        head = 0  # the embedding itself
    chunks[0] += embedding
    chunks[-1] += head + (sizes[FINAL_NORM] if last else 0)
    known = per_layer + sum(sizes[key] for key in (EMBEDDING, HEAD, FINAL_NORM) if key in sizes)
    assert known == sum(sizes.values()), "an entry outside the layers that this count does not know"
    return StageParameters(tuple(chunks), tuple(experts_per_layer * count for count in layers), embedding, head)


def model_parameters(entries: list[Entry]) -> int:
    """Elements of the whole model, as Hugging Face counts them (no padding, a tied head once)."""
    return sum(math.prod(entry.full_shape) for entry in entries)


def data_parallel_size(parallel: Parallel) -> int:
    """Replicas times context ranks: gradients are summed and the distributed optimizer is split over them."""
    return parallel.ranks // (parallel.tensor * parallel.pipeline)


def expert_data_parallel_size(parallel: Parallel) -> int:
    """Ranks that hold the same parts of the same experts."""
    return parallel.ranks // (parallel.expert * parallel.expert_tensor * parallel.pipeline)


def optimizer_shard(parameters: StageParameters, parallel: Parallel) -> int:
    """Elements in the distributed optimizer of data-parallel rank 0, the largest shard.

    Each chunk has a gradient buffer for its dense weights and one for its experts. A buffer is padded and cut in
    equal parts over the ranks that hold the same weights; the padding, at the end, is not counted.
    """

    def part(buffer: int, ranks: int) -> int:
        multiple = math.lcm(ranks, _BUCKET_MULTIPLE)
        return min(buffer, -(-buffer // multiple) * multiple // ranks)

    return sum(
        part(chunk - experts, data_parallel_size(parallel)) + part(experts, expert_data_parallel_size(parallel))
        for chunk, experts in zip(parameters.chunks, parameters.experts, strict=True)
    )


@dataclass(frozen=True)
class Shard:
    """What one built rank holds, in elements. optimizer: its part of the distributed optimizer, if built."""

    rank: int
    tensor_rank: int
    stage: int
    data_rank: int
    chunks: tuple[int, ...]
    optimizer: int | None

    @property
    def parameters(self) -> int:
        return sum(self.chunks)


@dataclass(frozen=True)
class Check:
    """The plan's numbers beside a built shard's."""

    shard: Shard
    planned: tuple[int, ...]
    planned_optimizer: int | None

    @property
    def agrees(self) -> bool:
        return self.shard.chunks == self.planned and self.shard.optimizer == self.planned_optimizer

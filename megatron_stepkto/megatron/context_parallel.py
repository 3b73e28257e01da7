"""Context parallelism: each rank holds a part of every document.

A document is cut into 2 C equal parts for C ranks; rank r holds parts r and 2 C - 1 - r, so that causal attention
costs every rank the same (Megatron's and Transformer Engine's order, ``thd_get_partitioned_indices``). Documents are
padded at the end to a multiple of 2 C tokens. Log-probs of response tokens are joined before the loss, which is
therefore independent of the split.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_stepkto.megatron.layers import PackedAttention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_stepkto.megatron.batch import MicroBatch


def held_positions(bounds: Sequence[int], rank: int, ranks: int) -> Tensor:
    """Positions of a packed micro-batch that a rank holds, in the order in which it holds them: [t / ranks] int64.

    Args:
        bounds: of the documents; each a multiple of 2 * ranks long.
    """
    parts = []
    for a, b in pairwise(bounds):
        assert (b - a) % (2 * ranks) == 0, "documents are padded to a multiple of twice the context parallel size"
        size = (b - a) // (2 * ranks)
        parts += [
            torch.arange(a + rank * size, a + (rank + 1) * size),
            torch.arange(b - (rank + 1) * size, b - rank * size),
        ]
    return torch.cat(parts)


def own_part(batch: MicroBatch, rank: int, ranks: int) -> tuple[MicroBatch, Tensor]:
    """This rank's tokens and scored rows of a micro-batch, and which of its [R] response tokens those rows predict.

    Document bounds stay those of whole documents: attention and RoPE divide by the ranks themselves.
    """
    held = held_positions(batch.packed.bounds, rank, ranks).to(batch.rows.device)
    place = torch.full((batch.tokens.shape[1],), -1, dtype=torch.int64, device=held.device)
    place[held] = torch.arange(held.numel(), device=held.device)
    local = place[batch.rows]
    mine = (local >= 0).nonzero()[:, 0]
    rows = local[mine]
    part = dataclasses.replace(
        batch,
        tokens=batch.tokens[:, held],
        position_ids=batch.position_ids[:, held],
        rows=rows,
        targets=batch.targets[mine],
    )
    return part, mine


def join(log_probs: Tensor, mine: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
    """[num_tokens] log-probs on every rank, from each rank's own; the gradient goes back to each rank's own.

    Every rank then computes the same loss. Its gradient with respect to a log-prob is whole on each of them, so the
    sum's backward is the identity: gradients of weights, summed over the ranks later, count each token once.
    """
    whole = log_probs.new_zeros(num_tokens).index_copy(0, mine, log_probs)
    joined: Tensor = _Sum.apply(whole, group)
    return joined


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _GatherDocuments(torch.autograd.Function):
    """[t / C, g, d] of each rank to [t, g, d] in the documents' order; backward: the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bounds: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
        ranks = group.size()
        ctx.group, ctx.held = group, held_positions(bounds, group.rank(), ranks).to(x.device)
        parts = [torch.empty_like(x) for _ in range(ranks)]
        dist.all_gather(parts, x.contiguous(), group=group)
        order = torch.cat([held_positions(bounds, rank, ranks) for rank in range(ranks)]).to(x.device)
        return torch.empty_like(torch.cat(parts)).index_copy_(0, order, torch.cat(parts))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        whole = grads[0].contiguous()
        dist.all_reduce(whole, group=ctx.group)  # gloo has no reduce-scatter
        return whole[ctx.held], None, None


class ContextParallelAttention(PackedAttention):
    """``PackedAttention`` for a rank that holds a part of every document: it gathers all keys and values.

    Memory for keys and values is that of whole documents; Transformer Engine's ring exchange needs less and overlaps
    it with the products, this one runs anywhere.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        # The base class refuses context parallelism, but only its own forward lacks it.
        super().__init__(dataclasses.replace(config, context_parallel_size=1), *args, **kwargs)
        self.config = config

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: Any = None, **__: Any
    ) -> Tensor:
        """query [t / C, h, d], key and value [t / C, g, d]; returns [t / C, h * d]."""
        assert packed_seq_params is not None, "micro-batches of this package are packed"
        group = parallel_state.get_context_parallel_group()
        bounds, rank, ranks = packed_seq_params.bounds, group.rank(), group.size()
        key, value = (_GatherDocuments.apply(x, bounds, group) for x in (key, value))
        sizes = [size for a, b in pairwise(bounds) for size in [(b - a) // (2 * ranks)] * 2]
        reach = [end for a, b in pairwise(bounds) for end in _ends(a, b, rank, ranks)]
        starts = [a for a, _ in pairwise(bounds) for _ in range(2)]
        parts = [
            scaled_dot_product_attention(
                part.transpose(0, 1)[None],
                key[a:end].transpose(0, 1)[None],
                value[a:end].transpose(0, 1)[None],
                attn_mask=_lower_right(part.shape[0], end - a, query.device),
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )[0].transpose(0, 1)
            for part, a, end in zip(query.split(sizes), starts, reach, strict=True)
        ]
        return torch.cat(parts).reshape(query.shape[0], -1)


def _ends(a: int, b: int, rank: int, ranks: int) -> tuple[int, int]:
    """Where the keys end that the last query of each of a rank's two parts of a document sees."""
    size = (b - a) // (2 * ranks)
    return a + (rank + 1) * size, b - rank * size


def _lower_right(queries: int, keys: int, device: torch.device) -> Tensor:
    """[queries, keys] bool: the last query sees all keys, each earlier one a key less."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)

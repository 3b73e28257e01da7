"""Which examples form an update, and how documents are packed into micro-batches. Pure integer arithmetic.

The order is a function of seed and epoch alone: it survives a restart and does not change with the layout.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

from megatron_stepkto.base.files import stable_hash


def plan_updates(
    num_units: int, global_batch_size: int, epochs: int, seed: int, max_updates: int | None = None
) -> list[Sequence[int]]:
    """Unit indices of every update; each epoch is a permutation, its last batch may be smaller.

    A unit is an example, or a preference pair.
    """
    updates: list[Sequence[int]] = []
    for epoch in range(epochs):
        order = array("q", range(num_units))  # a fifth of the memory of a list
        random.Random(stable_hash(seed, "epoch", epoch)).shuffle(order)
        updates += [order[i : i + global_batch_size] for i in range(0, num_units, global_batch_size)]
    return updates[:max_updates]


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: bins of indices whose sizes sum to at most ``capacity``.

    Raises:
        ValueError: an item is larger than a bin.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        size = sizes[index]
        if size > capacity:
            raise ValueError(f"item {index} has size {size}, a bin holds {capacity}")
        for number, free in enumerate(room):
            if size <= free:
                bins[number].append(index)
                room[number] -= size
                break
        else:
            bins.append([index])
            room.append(capacity - size)
    return bins


def share_out(bins: Sequence[list[int]], sizes: Sequence[int], ranks: int, multiple: int = 1) -> list[list[list[int]]]:
    """Bins per rank, as even in size as a greedy choice makes them; every rank gets the same number of bins.

    That number is rounded up to ``multiple`` (interleaved pipelines need one); empty bins fill up.
    """
    per_rank = -(-max(len(bins), 1) // ranks)
    per_rank = -(-per_rank // multiple) * multiple
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for number in sorted(range(len(bins)), key=lambda i: (-sum(sizes[j] for j in bins[i]), i)):
        rank = min((r for r in range(ranks) if len(shares[r]) < per_rank), key=lambda r: (loads[r], r))
        shares[rank].append(bins[number])
        loads[rank] += sum(sizes[j] for j in bins[number])
    for share in shares:
        share += [[] for _ in range(per_rank - len(share))]
    return shares

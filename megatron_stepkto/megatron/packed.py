"""What attention layers need to know of a packed micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class PackedDocuments(PackedSeqParams):
    """PackedSeqParams that also holds the document bounds as Python ints (no device read per layer), and ``rows``,
    [R] int64: the positions whose hidden states are scored."""

    bounds: tuple[int, ...] = ()
    rows: Tensor | None = None

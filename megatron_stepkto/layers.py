"""Modules of the local layer spec (no Transformer Engine): a norm and a core attention."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that may run under sequence parallelism.

    Megatron's WrappedTorchNorm refuses it: each rank sees a part of the tokens, so the weight's gradient must
    be summed over the tensor-parallel group; ``finalize_model_grads`` does that for a weight with this mark.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedAttention(DotProductAttention):
    """torch's scaled-dot-product attention over packed documents that never see each other.

    A loop over documents: on CPU it was faster than one block-diagonal mask (54 ms against 363 ms for 8
    documents in 2,048 tokens), and it needs no O(s^2) memory.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """query [t, h, d], key and value [t, g, d] of one packed micro-batch; returns [t, h * d]."""
        assert attention_bias is None, "attention bias is not used by any model of this package"
        assert packed_seq_params is not None, "micro-batches of this package are packed"
        bounds = packed_seq_params.bounds
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        dropout = self.attention_dropout.p if self.training else 0.0
        parts = [
            scaled_dot_product_attention(
                q[:, :, a:b],
                k[:, :, a:b],
                v[:, :, a:b],
                is_causal=True,
                scale=self.softmax_scale,
                dropout_p=dropout,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            for a, b in pairwise(bounds)
        ]
        return torch.cat(parts, dim=2)[0].transpose(0, 1).reshape(query.shape[0], -1)

"""Modules of the local layer spec (no Transformer Engine); norm, SwiGLU and RoPE have kernels that only a CPU runs.

On a CPU an elementwise operation costs its passes over memory, so these have a forward and a backward written with
few passes, and keep few tensors for the backward: `make demo` needs the speed. On a GPU torch's and Megatron's own
kernels run.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that may run under sequence parallelism.

    Megatron's WrappedTorchNorm refuses that: each rank has a part of the tokens, so the weight's gradient must
    be summed over the tensor-parallel group; ``finalize_model_grads`` does that for a weight with this mark.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        normed: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return normed


class _RMSNorm(torch.autograd.Function):
    """y = x * r * w with r = (mean(x^2) + eps)^-1/2 over the last dimension; in float32, returned in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        r = r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """dx = r (g w) - x r^3 mean(g w x); dw = sum over tokens of g x r."""
        x, weight, r = ctx.saved_tensors
        size, dtype = x.shape[-1], x.dtype
        grad, x, weight = grads[0].float(), x.float(), weight.float()
        product = grad * x
        flat = product.reshape(-1, size)  # a gradient may come transposed
        grad_weight = torch.mv(flat.t(), r.reshape(-1)).to(dtype) if ctx.needs_input_grad[1] else None
        factor = torch.mv(flat, weight).view_as(r) * r.pow(3).div_(-size)
        grad_x = torch.mul(grad, weight, out=product).mul_(r).addcmul_(x, factor)
        return grad_x.to(dtype), grad_weight, None


class PackedAttention(DotProductAttention):
    """torch's scaled-dot-product attention over packed documents, without attention between documents.

    A loop over documents: on CPU it was faster than one block-diagonal mask (54 ms against 363 ms for 8
    documents in 2,048 tokens), and it needs no O(s^2) memory. One ``split`` for all documents: a slice per document
    would cost a zero-filled gradient of the whole micro-batch each.
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
        sizes = [b - a for a, b in pairwise(packed_seq_params.bounds)]
        dropout = self.attention_dropout.p if self.training else 0.0
        parts = [
            scaled_dot_product_attention(
                q.transpose(0, 1)[None],
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                is_causal=True,
                scale=self.softmax_scale,
                dropout_p=dropout,
                enable_gqa=query.shape[1] != key.shape[1],
            )[0].transpose(0, 1)
            for q, k, v in zip(query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
        ]
        return torch.cat(parts).view(query.shape[0], -1)


def rotate_packed(t: Tensor, cu_seqlens: Tensor, freqs: Tensor, **_: Any) -> Tensor:
    """RoPE of packed documents, positions counted from 0 in each; Megatron's name for it is "fused, thd".

    Args:
        t: [t, h, d]. cu_seqlens: [D + 1] int32, document bounds. freqs: [s, 1, 1, r] angles by position, r <= d.
    Returns:
        [t, h, d]; only the first r channels are rotated, channel i with channel i + r / 2.
    """
    cos, sin = _angles.of(cu_seqlens, freqs, t.dtype)
    turned: Tensor = _Rotation.apply(t, cos, sin)
    return turned


class _PackedAngles:
    """Cosine and sine of a micro-batch's positions, kept for its other layers: one entry, found by identity."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = (None, None, None)
        self.value: tuple[Tensor, Tensor]

    def of(self, cu_seqlens: Tensor, freqs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[t, 1, r / 2] each."""
        if not (self.key[0] is cu_seqlens and self.key[1] is freqs and self.key[2] is dtype):
            half = freqs[:, 0, :, : freqs.shape[-1] // 2]
            sizes = [b - a for a, b in pairwise(cu_seqlens.tolist())]
            self.value = tuple(  # type: ignore[assignment]
                torch.cat([table[:size] for size in sizes]) for table in (half.cos().to(dtype), half.sin().to(dtype))
            )
            self.key = (cu_seqlens, freqs, dtype)
        return self.value


_angles = _PackedAngles()


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(t, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1), None, None


def _turn(t: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    half = cos.shape[-1]
    first, second = t[..., :half], t[..., half : 2 * half]
    out = torch.empty_like(t, memory_format=torch.contiguous_format)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin, value=direction)
    out[..., 2 * half :] = t[..., 2 * half :]
    return out


class GatedMLP(MLP):
    """Megatron's SwiGLU MLP; on CPU with the activation of ``_SwiGLU``."""

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any) -> Any:
        if hidden_states.device.type != "cpu":
            return super().forward(hidden_states, per_token_scale, **kwargs)
        assert self.config.activation_func is silu, "every model of this package has a SwiGLU MLP"
        assert per_token_scale is None, "a dense MLP has no router"
        gate_and_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(_SwiGLU.apply(gate_and_up))


class _SwiGLU(torch.autograd.Function):
    """silu(a) * b of x = [a, b]; keeps x alone, where autograd would keep silu(a) too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        a, b = x.chunk(2, dim=-1)
        return silu(a).mul_(b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        a, b = x.chunk(2, dim=-1)
        grad = torch.empty_like(x)
        grad_a, grad_b = grad.chunk(2, dim=-1)
        torch.ops.aten.silu.out(a, out=grad_b).mul_(grads[0])
        torch.ops.aten.silu_backward.grad_input(grads[0] * b, a, grad_input=grad_a)
        return grad


class ScoredLayer(TransformerLayer):
    """The model's last layer: after its attention it keeps only positions that predict a response token.

    Nothing reads the other positions (prompts, each document's last token), and nothing attends to them later. In
    training on 1/3 prompt tokens and 4 layers this is 1/16 of all matrix products. Returns [rows, 1, H].
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        hidden, context = self._forward_attention(*args, **kwargs)
        rows = kwargs["packed_seq_params"].rows
        return self._forward_mlp(hidden.index_select(0, rows)), context

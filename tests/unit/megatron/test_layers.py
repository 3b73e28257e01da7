"""The CPU's own norm, RoPE, SwiGLU and packed attention against plain formulas in float64, values and gradients."""

from __future__ import annotations

import types
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_stepkto.megatron import patches

# Before Megatron-Core is imported, as in a run; not beside a GPU, whose tests may share this process.
if not torch.cuda.is_available():
    patches.install()

from megatron_stepkto.megatron import layers

BOUNDS = (0, 1, 8, 40, 43)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(ours: Any, truth: Any, inputs: list[Tensor], tolerance: float = 1e-5) -> None:
    """``ours`` of float32 inputs against ``truth`` of the same in float64: output, and gradient of each input."""
    mine = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    out, right = ours(*mine), truth(*exact)
    assert out.shape == right.shape
    weights = random(*out.shape, seed=99)
    out.backward(weights)
    right.backward(weights.double())
    for a, b in [(out, right), *((x.grad, y.grad) for x, y in zip(mine, exact, strict=True))]:
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


def norm_of(size: int, eps: float) -> layers.RMSNorm:
    return layers.RMSNorm(types.SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), size, eps)


@pytest.mark.parametrize("shape", [(7, 1, 16), (5, 3, 4, 16), (0, 1, 16)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    """eps is large enough to count: a forgotten one fails."""
    norm = norm_of(16, eps=0.3)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return layers._RMSNorm.apply(x, weight, norm.eps)

    def truth(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 0.3).rsqrt() * weight

    x, weight = random(*shape), random(16, seed=1)
    if x.numel():
        check(ours, truth, [x, weight])
        torch.testing.assert_close(norm(x), ours(x, torch.ones(16)))
        # a view that is not contiguous, as query and key are
        check(lambda x, w: ours(x.transpose(0, 1), w), lambda x, w: truth(x.transpose(0, 1), w), [x, weight])
        # and a gradient that is not
        check(lambda x, w: ours(x, w).transpose(0, -1), lambda x, w: truth(x, w).transpose(0, -1), [x, weight])
    else:
        assert ours(x, weight).shape == shape


def test_swiglu() -> None:
    def truth(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return a * torch.sigmoid(a) * b

    check(layers._SwiGLU.apply, truth, [random(9, 1, 24)])
    assert layers._SwiGLU.apply(random(0, 1, 24)).shape == (0, 1, 12)


@pytest.mark.parametrize("turned", [8, 4])
def test_packed_rope(turned: int) -> None:
    """Complex multiplication by e^(i position angle), position from 0 in each document; the rest stays."""
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.01])[: turned // 2]
    angles = torch.outer(torch.arange(50.0), frequencies)
    freqs = torch.cat([angles, angles], dim=-1)[:, None, None]
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(BOUNDS)])
    phase = torch.polar(torch.ones(43, 1, turned // 2).double(), angles[positions][:, None].double())

    def truth(t: Tensor) -> Tensor:
        pairs = torch.complex(t[..., : turned // 2], t[..., turned // 2 : turned]) * phase
        return torch.cat([pairs.real, pairs.imag, t[..., turned:]], dim=-1)

    offsets = torch.tensor(BOUNDS, dtype=torch.int32)
    check(lambda t: layers.rotate_packed(t, offsets, freqs), truth, [random(43, 3, 8)])
    other = torch.tensor([0, 43], dtype=torch.int32)
    assert not torch.equal(
        layers.rotate_packed(random(43, 3, 8), other, freqs), layers.rotate_packed(random(43, 3, 8), offsets, freqs)
    ), "angles of another micro-batch were kept"


def attention(**config: Any) -> layers.PackedAttention:
    made = layers.PackedAttention.__new__(layers.PackedAttention)
    torch.nn.Module.__init__(made)
    made.attention_dropout = torch.nn.Dropout(0.0)
    made.softmax_scale = config["scale"]
    return made


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_packed_attention(groups: int) -> None:
    """Softmax over a document's own earlier positions, with every score written out."""
    module = attention(scale=0.4)
    packed = types.SimpleNamespace(bounds=BOUNDS)
    document = torch.repeat_interleave(torch.arange(len(BOUNDS) - 1), torch.tensor(BOUNDS).diff())
    seen = (document[:, None] == document) & (torch.arange(43)[:, None] >= torch.arange(43))

    def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(4 // groups, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * 0.4
        shares = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", shares, v).flatten(1)

    inputs = [random(43, 4, 8), random(43, groups, 8, seed=1), random(43, groups, 8, seed=2)]
    check(lambda q, k, v: module(q, k, v, None, packed_seq_params=packed), truth, inputs)


def test_packed_attention_keeps_no_square_of_the_tokens() -> None:
    """What it keeps for the backward grows with the tokens: twice the tokens, less than 2.5 times the bytes."""
    module = attention(scale=1.0)

    def kept_bytes(tokens: int) -> int:
        kept = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal kept
            kept += x.numel() * x.element_size()
            return x

        q, k, v = (random(tokens, 2, 32, seed=i).requires_grad_() for i in range(3))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            module(q, k, v, None, packed_seq_params=types.SimpleNamespace(bounds=(0, tokens // 2, tokens)))
        return kept

    assert 0 < kept_bytes(2048) < 2.5 * kept_bytes(1024)

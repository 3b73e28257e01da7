"""The chunked log-prob head at a large vocabulary, in a GPU's own count of memory."""

from __future__ import annotations

import pytest
import torch

from megatron_stepkto.logprobs import linear_log_probs

pytestmark = pytest.mark.gpu
WORDS, TOKENS, HIDDEN = 128_256, 8_192, 4_096


def test_head_needs_less_than_600_mb_beyond_the_weights_gradient(device: str) -> None:
    if device == "cpu":
        pytest.skip("a GPU's memory counter is read; benchmarks/logprob_head.py measures the CPU")
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
    weight = torch.randn(WORDS, HIDDEN, device="cuda", dtype=torch.bfloat16, generator=generator) / HIDDEN**0.5
    weight.requires_grad_()
    targets = torch.randint(0, WORDS, (TOKENS,), device="cuda", generator=generator)
    gradient = torch.zeros(WORDS, HIDDEN, device="cuda")  # DDP's buffer in training, which is there all the time
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    log_probs = linear_log_probs(hidden, weight, targets, WORDS, grad_buffer=gradient)
    log_probs.sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 600e6
    rows = torch.arange(0, TOKENS, 512, device="cuda")
    truth = (hidden[rows].double() @ weight.double().t()).log_softmax(-1).gather(1, targets[rows, None])[:, 0]
    assert (log_probs[rows] - truth).abs().max() < 0.05
    # d(sum of log-probs) / d weight of a few words, in float64
    words = targets[:4]
    with torch.no_grad():
        truth = torch.zeros(4, HIDDEN, dtype=torch.float64, device="cuda")
        for part, wanted in zip(hidden.split(512), targets.split(512), strict=True):
            logits = part.double() @ weight.double().t()
            share = -(logits[:, words] - logits.logsumexp(-1, keepdim=True)).exp()
            truth += (share + (wanted[:, None] == words).double()).t() @ part.double()
    assert (gradient[words].double() - truth).abs().max() < 2**-7 * truth.abs().max()

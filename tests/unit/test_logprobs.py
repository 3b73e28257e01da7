"""The chunked vocab-parallel head against torch's own log-softmax in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch

from megatron_stepkto.evaluation import scorers
from megatron_stepkto.logprobs import linear_log_probs, linear_log_probs_and_entropy, log_softmax


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (hidden @ weight.t()).log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("padding", [0, 3])
def test_equals_log_softmax(chunk: int, padding: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, size, words = 17, 8, 21
    hidden = torch.randn(tokens, size, generator=generator)
    weight = torch.randn(words + padding, size, generator=generator)
    targets = torch.randint(0, words, (tokens,), generator=generator)
    grad = torch.randn(tokens, generator=generator)

    h64, w64 = hidden.double().requires_grad_(), weight[:words].double().requires_grad_()
    truth = plain(h64, w64, targets)
    truth.backward(grad.double())
    assert h64.grad is not None
    assert w64.grad is not None

    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    ours = linear_log_probs(h, w, targets, words, chunk=chunk)
    ours.backward(grad)
    assert h.grad is not None
    assert w.grad is not None
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(h.grad.double(), h64.grad, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(w.grad[:words].double(), w64.grad, rtol=1e-6, atol=4e-6)
    assert (w.grad[words:] == 0).all()


def test_likely_word_hides_none_of_a_large_vocabulary() -> None:
    """49,152 words, one e^20 times as likely as the others: summed after it one by one in float32, they would vanish.

    torch's own log-softmax on a CPU with AVX2 is 1.7e-5 nats off here.
    """
    torch.manual_seed(0)
    words, rows = 49_152, scorers.HEAD_ROWS + 40
    hidden, weight, targets = torch.randn(rows, 64), torch.randn(words + 100, 64) * 0.1, torch.randint(words, (rows,))
    weight[:, 0], weight[7, 0], hidden[:, 0] = 0, 1, 20
    truth = plain(hidden.double(), weight[:words].double(), targets)
    whole = log_softmax(hidden @ weight[:words].t()).gather(1, targets[:, None])[:, 0]
    scores = scorers._read_head(hidden, weight, targets, words)
    for found in (linear_log_probs(hidden, weight, targets, words), whole, scores.log_probs):
        assert (found - truth).mean().abs() < 1e-6
        assert (found - truth).abs().max() < 3e-5  # the float32 logit of 20 that all of them subtract is 4e-6 off
    assert scores.best.eq(7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_added_to_a_buffer(dtype: torch.dtype) -> None:
    """To what is there, in float32; padded rows get nothing, and the weight no gradient of its own."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(17, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(24, 8, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, 21, (17,), generator=generator)
    linear_log_probs(hidden, weight, targets, 21, chunk=5).sum().backward()
    assert weight.grad is not None
    assert hidden.grad is not None
    own, own_hidden = weight.grad, hidden.grad
    hidden.grad = weight.grad = None
    before = torch.randn(24, 8, generator=generator)
    buffer = before.clone()
    linear_log_probs(hidden, weight, targets, 21, chunk=5, grad_buffer=buffer).sum().backward()
    assert weight.grad is None
    assert torch.equal(hidden.grad, own_hidden)
    # the weight's own gradient is rounded to its dtype at the end, the buffer's is not
    torch.testing.assert_close(buffer - before, own.float(), rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    assert torch.equal(buffer[21:], before[21:])
    again = before.clone()
    told = linear_log_probs(hidden, weight, targets, 21, chunk=5, grad_buffer=again, placeholder=True)
    told.sum().backward()
    assert weight.grad is not None and weight.grad.shape == weight.shape  # a placeholder, so that hooks run
    assert torch.equal(again, buffer)


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4], [-1e4]])
    weight = torch.tensor([[1.0], [0.5], [-1.0]])
    out = linear_log_probs(hidden, weight, torch.tensor([0, 0]), 3)
    assert out.tolist() == pytest.approx([0.0, -2e4])


def test_bfloat16_is_within_its_rounding_of_the_truth() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(40, 64, generator=generator).bfloat16()
    weight = (torch.randn(300, 64, generator=generator) / 8).bfloat16()
    targets = torch.randint(0, 300, (40,), generator=generator)
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    truth = plain(h64, w64, targets)
    truth.sum().backward()
    assert h64.grad is not None
    assert w64.grad is not None
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    ours = linear_log_probs(h, w, targets, 300, chunk=16)
    ours.sum().backward()
    assert h.grad is not None
    assert w.grad is not None
    assert (ours.double() - truth).abs().max() < 2e-6 * truth.abs().max()  # logits are not rounded to bf16
    assert (h.grad.double() - h64.grad).abs().max() < 2**-7 * h64.grad.abs().max()
    assert (w.grad.double() - w64.grad).abs().max() < 2**-7 * w64.grad.abs().max()


def test_no_tokens() -> None:
    hidden = torch.zeros(0, 4, requires_grad=True)
    weight = torch.randn(6, 4, requires_grad=True)
    linear_log_probs(hidden, weight, torch.zeros(0, dtype=torch.int64), 6).sum().backward()
    assert weight.grad is not None
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("chunk", [1, 5, None])
def test_entropy_of_padded_vocabulary(chunk: int | None) -> None:
    """-sum p log p over the 21 words, in float64; the log-probs and their gradient are those without entropy."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(17, 8, generator=generator).requires_grad_()
    weight = torch.randn(24, 8, generator=generator).requires_grad_()
    targets = torch.randint(0, 21, (17,), generator=generator)
    log_probs, entropy = linear_log_probs_and_entropy(hidden, weight, targets, 21, chunk=chunk)
    truth = (hidden.detach().double() @ weight.detach()[:21].double().t()).log_softmax(-1)
    torch.testing.assert_close(entropy.double(), -(truth.exp() * truth).sum(-1), rtol=1e-6, atol=1e-6)
    assert not entropy.requires_grad
    with_it = torch.autograd.grad(log_probs.sum(), [hidden, weight])
    without = linear_log_probs(hidden, weight, targets, 21, chunk=chunk)
    assert torch.equal(log_probs, without)
    assert all(map(torch.equal, with_it, torch.autograd.grad(without.sum(), [hidden, weight])))


def test_entropy_of_extreme_logits() -> None:
    """A certain word: 0; the three of equal logits: log 3. No 0 * infinity."""
    hidden = torch.tensor([[1e4], [0.0]])
    weight = torch.tensor([[1.0], [0.5], [-1.0]])
    _, entropy = linear_log_probs_and_entropy(hidden, weight, torch.tensor([0, 0]), 3)
    assert entropy.tolist() == pytest.approx([0.0, 1.0986123])

"""Hidden states -> token log-probs, over a vocabulary that is split over ranks, never a full logits tensor.

8,192 tokens x 128,256 words are 4.2 GB in float32. The head works through the tokens in chunks, keeps only
each token's log-sum-exp, and computes a chunk's logits again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Logits that exist at one time on a rank: 268 MB of float32, 512 tokens of a vocabulary of 128,256.
LOGITS_AT_A_TIME = 1 << 26


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    group: Any = None,
    chunk: int | None = None,
    grad_buffer: Tensor | None = None,
    placeholder: bool = False,
) -> Tensor:
    """log softmax(hidden @ weight.T)[target] of each token.

    Args:
        hidden: [T, H], the same on every rank of ``group``. Its gradient is this rank's part: the caller sums
            it over ``group`` (Megatron's copy_to or gather_from_sequence region does that in its backward).
        weight: [V_local, H], this rank's rows. Row i is word rank * V_local + i; rows at or past ``vocab_size``
            are padding: they take no part and get no gradient.
        targets: [T] int64 in [0, vocab_size).
        vocab_size: words of the tokenizer, without padding.
        group: process group over which the vocabulary is split; None: not split.
        chunk: tokens whose logits exist at one time; None: as many as LOGITS_AT_A_TIME allows.
        grad_buffer: [V_local, H] float32. The weight's gradient is added to it, and ``weight`` itself gets none: a
            gradient of its own is 2 GB of float32 for 128,256 words of 4,096 numbers.
        placeholder: with ``grad_buffer``: ``weight`` gets a gradient without meaning, so that its hooks run.
    Returns:
        [T] float32, nats.
    """
    log_probs: Tensor = _apply(hidden, weight, targets, vocab_size, group, chunk, False, grad_buffer, placeholder)[0]
    return log_probs


def linear_log_probs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    group: Any = None,
    chunk: int | None = None,
    grad_buffer: Tensor | None = None,
    placeholder: bool = False,
) -> tuple[Tensor, Tensor]:
    """``linear_log_probs``, and the entropy of each token's distribution: [T] float32, nats, without gradient.

    It needs one more pass over the logits, and a second chunk of them while the forward runs.
    """
    log_probs, entropy = _apply(hidden, weight, targets, vocab_size, group, chunk, True, grad_buffer, placeholder)
    return log_probs, entropy


def log_softmax(logits: Tensor) -> Tensor:
    """[..., V] float32 logits -> log-probs, nats.

    On a CPU torch's own adds float32 shares one by one: of SmolLM2's 49,152 words the small ones vanish, and all
    log-probs are 1.4e-5 nats too high. logsumexp adds them in pairs.
    """
    return logits - logits.logsumexp(-1, keepdim=True)


def tokens_at_a_time(rows: int) -> int:
    """Tokens whose logits over ``rows`` words of a rank exist at one time."""
    return max(1, LOGITS_AT_A_TIME // rows)


def _apply(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    group: Any,
    chunk: int | None,
    entropy: bool,
    grad_buffer: Tensor | None,
    placeholder: bool,
) -> Any:
    assert hidden.dtype == weight.dtype, f"hidden states are {hidden.dtype}, the head's weight is {weight.dtype}"
    if chunk is None:  # from the padded rows, which are the same number on every rank
        chunk = tokens_at_a_time(weight.shape[0])
    return _LinearLogProbs.apply(hidden, weight, targets, vocab_size, group, chunk, entropy, grad_buffer, placeholder)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight.T in float32, also for lower-precision inputs: their logits must not be rounded."""
    if hidden.dtype == torch.float32:
        return hidden @ weight.t()
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return hidden.float() @ weight.float().t()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in total's float32: a bf16 running sum would lose the small summands."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += (a @ b).float()


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        group: Any,
        chunk: int,
        with_entropy: bool,
        grad_buffer: Tensor | None,
        placeholder: bool,
    ) -> tuple[Tensor, Tensor]:
        rank = dist.get_rank(group) if group is not None else 0
        first_word = rank * weight.shape[0]
        rows = max(0, min(weight.shape[0], vocab_size - first_word))
        log_probs = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        log_sum_exp = torch.empty_like(log_probs)
        entropy = torch.empty_like(log_probs) if with_entropy else log_probs.new_empty(0)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight[:rows])
            local, mine = _local_targets(targets[part], first_word, rows)
            target_logit = torch.zeros_like(log_probs[part])
            if rows:
                target_logit = torch.where(mine, logits.gather(1, local[:, None])[:, 0], target_logit)
                peak = logits.amax(dim=1)
            else:
                peak = torch.full_like(target_logit, float("-inf"))
            _all_reduce(peak, dist.ReduceOp.MAX, group)
            shares = logits.sub_(peak[:, None])
            # entropy = log S - sum(e^l l) / S with l = logit - peak and S = sum(e^l)
            weighted = [torch.linalg.vecdot(shares.exp(), shares)] if with_entropy else []
            sums = torch.stack([shares.exp_().sum(dim=1), target_logit, *weighted])
            _all_reduce(sums, dist.ReduceOp.SUM, group)
            log_sum = sums[0].log()
            log_sum_exp[part] = peak + log_sum
            log_probs[part] = sums[1] - log_sum_exp[part]
            if with_entropy:
                entropy[part] = log_sum - sums[2] / sums[0]
            del logits, shares  # before the next chunk's logits are made
        ctx.save_for_backward(hidden, weight, targets, log_sum_exp)
        ctx.first_word, ctx.rows, ctx.chunk = first_word, rows, chunk
        ctx.grad_buffer, ctx.placeholder = grad_buffer, placeholder
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        hidden, weight, targets, log_sum_exp = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        buffer = ctx.grad_buffer
        trains = ctx.needs_input_grad[1]  # a frozen head has no gradient
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if buffer is None and trains else buffer
        rows = ctx.rows
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            if not rows:
                grad_hidden[part] = 0
                continue
            # d log p_target / d logits = onehot(target) - softmax
            d_logits = _logits(hidden[part], weight[:rows]).sub_(log_sum_exp[part, None]).exp_().neg_()
            local, mine = _local_targets(targets[part], ctx.first_word, rows)
            d_logits.scatter_add_(1, local[:, None], mine[:, None].to(d_logits.dtype))
            d_logits.mul_(grad[part, None])
            d_logits_low = d_logits.to(weight.dtype)
            grad_hidden[part] = d_logits_low @ weight[:rows]
            if grad_weight is not None:
                _add_product(grad_weight[:rows], d_logits_low.t(), hidden[part])
            del d_logits, d_logits_low  # before the next chunk's logits are made
        if buffer is not None:
            own = torch.empty_like(weight) if ctx.placeholder else None
        else:
            own = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, own, *[None] * 7


def _local_targets(targets: Tensor, first_word: int, rows: int) -> tuple[Tensor, Tensor]:
    """Row of each target in this rank's weight (0 where it is another rank's) and whether it is here."""
    local = targets - first_word
    mine = (local >= 0) & (local < rows)
    return torch.where(mine, local, 0), mine


def _all_reduce(tensor: Tensor, op: Any, group: Any) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)

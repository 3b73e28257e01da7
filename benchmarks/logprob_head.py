"""The chunked log-prob head beside the plain one (logits, log-softmax, gather): peak extra memory, and time.

    python -m benchmarks.logprob_head

Memory: at 8,192 tokens and 128,256 words, what forward and backward add to the resident memory at most, without the
weight's gradient, as a share of one full float32 logits tensor (goal: at most 1/8). Time: at a size where the plain
version fits, forward and backward, medians of alternating runs (goal: at most 1.45; the floor is 4/3, as the chunked
head computes the logits twice: four matrix products instead of three).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_stepkto.logprobs import linear_log_probs

WORDS = 128_256


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(hidden @ weight.t(), dim=-1).gather(1, targets[:, None])[:, 0]


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_log_probs(hidden, weight, targets, weight.shape[0])


def inputs(tokens: int, words: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, size, generator=generator).requires_grad_()
    weight = (torch.randn(words, size, generator=generator) / size**0.5).requires_grad_()
    return hidden, weight, torch.randint(0, words, (tokens,), generator=generator)


def run(head: Callable[[Tensor, Tensor, Tensor], Tensor], given: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(head(*given).sum(), given[:2]))


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak since the last reset) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def extra_memory(tokens: int, words: int, size: int) -> float:
    """Peak bytes that forward and backward add, beyond the weight's gradient."""
    given = inputs(tokens, words, size)
    run(chunked, inputs(8, 512, size))  # the libraries' own buffers
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_bytes("VmRSS")
    grads = run(chunked, given)
    return resident_bytes("VmHWM") - before - grads[1].nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024, help="of the timed size")
    parser.add_argument("--words", type=int, default=32_000, help="of the timed size")
    parser.add_argument("--hidden", type=int, default=1024, help="of the timed size")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if arguments.clock == "processor" else time.perf_counter

    share = extra_memory(8192, WORDS, 64) / (8192 * WORDS * 4)
    print(f"peak extra memory at 8,192 tokens, {WORDS:,} words: {share:.4f} of full float32 logits (goal: 0.125)")

    given = inputs(arguments.tokens, arguments.words, arguments.hidden)
    seconds: dict[str, list[float]] = {"plain": [], "chunked": []}
    gradients = {}
    for _ in range(arguments.repeats):
        for name, head in (("plain", plain), ("chunked", chunked)):
            begun = clock()
            gradients[name] = run(head, given)
            seconds[name].append(clock() - begun)
    for ours, theirs in zip(gradients["chunked"], gradients["plain"], strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), "the two heads disagree"
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{arguments.tokens} tokens, {arguments.words} words, hidden {arguments.hidden}, seconds: {medians}")
    print(
        json.dumps(
            {
                "memory_share_of_logits": round(share, 4),
                "ratio_time": round(medians["chunked"] / medians["plain"], 3),
                "plain_s": round(medians["plain"], 3),
                "chunked_s": round(medians["chunked"], 3),
                "clock": arguments.clock,
            }
        )
    )


if __name__ == "__main__":
    main()

"""The log-prob head on a GPU: chunk sizes against full logits, and against Liger's fused kernel where installed.

    python -m benchmarks.gpu_head

Forward and backward at 8,192 tokens, hidden 4,096 and 128,256 words in bf16. Memory is the peak beyond the weight's
gradient, by torch's own counter (goal: under 600 MB); in training that gradient is DDP's float32 buffer, to which the
chunked head adds, as it does here. Liger's kernel gives the summed cross-entropy alone, which no
preference loss can use (it needs each token's log-prob and its own gradient): it is here as a floor. Not yet run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_stepkto.logprobs import linear_log_probs

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def liger() -> Head | None:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, targets: -loss(weight, hidden, targets)


def measure(head: Head, given: tuple[Tensor, Tensor, Tensor], repeats: int, *, own_gradient: bool) -> dict[str, Any]:
    """own_gradient: the head makes the weight's gradient, in bf16, which is taken off; else it adds to a buffer."""
    hidden, weight, targets = given
    wanted = (hidden, weight) if own_gradient else (hidden,)
    found = []
    for number in range(repeats + 2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.autograd.grad(head(hidden, weight, targets).sum(), wanted)
        end.record()
        torch.cuda.synchronize()
        if number >= 2:
            found.append(begin.elapsed_time(end))
    extra = torch.cuda.max_memory_allocated() - before - (weight.nbytes if own_gradient else 0)
    return {"ms": statistics.median(found), "extra_mb": extra / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--words", type=int, default=128_256)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: torch sees no NVIDIA GPU (benchmarks/logprob_head.py measures the CPU)")
        return
    generator = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    hidden = torch.randn(arguments.tokens, arguments.hidden, **options).requires_grad_()
    weight = (torch.randn(arguments.words, arguments.hidden, **options) / arguments.hidden**0.5).requires_grad_()
    targets = torch.randint(0, arguments.words, (arguments.tokens,), device="cuda", generator=generator)

    buffer = torch.zeros(weight.shape, device="cuda")

    def chunked(size: int) -> Head:
        return lambda h, w, t: linear_log_probs(h, w, t, w.shape[0], chunk=size, grad_buffer=buffer)

    heads: dict[str, Head | None] = {
        "full logits": full_logits,
        **{f"chunks of {size}": chunked(size) for size in (256, 512, 1024, 2048, 4096)},
        "Liger's fused cross-entropy": liger(),
    }
    rows: dict[str, Any] = {}
    for name, head in heads.items():
        if head is None:
            rows[name] = {"not_run": "liger-kernel is not installed"}
        else:
            try:
                rows[name] = measure(
                    head, (hidden, weight, targets), arguments.repeats, own_gradient=not name.startswith("chunks")
                )
            except torch.cuda.OutOfMemoryError:
                rows[name] = {"not_run": "out of memory"}
        print(f"{name:28}", rows[name], flush=True)
    plain = rows["full logits"].get("ms")
    ratios = {name: row["ms"] / plain for name, row in rows.items() if plain and "ms" in row}
    best = min((row["extra_mb"] for name, row in rows.items() if "chunks" in name and "ms" in row), default=None)
    print(f"least memory of the chunked head: {best} MB (goal: under 600)")
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows, "ratios": ratios}))


if __name__ == "__main__":
    main()

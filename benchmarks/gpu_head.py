"""The log-prob head on a GPU: chunk sizes against full logits, and against Liger's fused kernel where installed.

    python -m benchmarks.gpu_head
    python -m benchmarks.gpu_head --device cpu --tokens 256 --words 4096 --hidden 128     (tries the script)

Forward and backward at 8,192 tokens, hidden 4,096 and 128,256 words in bf16. Memory is the peak beyond the weight's
gradient, by torch's own counter (goal: under 600 MB); in training that gradient is DDP's float32 buffer, to which the
chunked head adds, as it does here. Liger's kernel gives the summed cross-entropy alone, which no
preference loss can use (it needs each token's log-prob and its own gradient): it is here as a floor. Not yet run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_train import seconds
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

    def work() -> None:
        torch.autograd.grad(head(hidden, weight, targets).sum(), wanted)

    with torch.no_grad():
        row = {"nats": head(hidden, weight, targets).sum().item()}
    row["ms"] = 1e3 * seconds(work, hidden.device, repeats)
    if hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - (weight.nbytes if own_gradient else 0)
        row["extra_mb"] = extra / 1e6
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--words", type=int, default=128_256)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("skipped: torch sees no NVIDIA GPU (benchmarks/logprob_head.py measures the CPU)")
        return
    generator = torch.Generator(arguments.device).manual_seed(0)
    options: dict[str, Any] = {"device": arguments.device, "dtype": torch.bfloat16, "generator": generator}
    hidden = torch.randn(arguments.tokens, arguments.hidden, **options).requires_grad_()
    weight = (torch.randn(arguments.words, arguments.hidden, **options) / arguments.hidden**0.5).requires_grad_()
    targets = torch.randint(0, arguments.words, (arguments.tokens,), device=arguments.device, generator=generator)
    buffer = torch.zeros(weight.shape, device=arguments.device)

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
            except RuntimeError as error:  # out of memory, or Liger's kernel has no driver: the others are measured
                rows[name] = {"not_run": " ".join(str(error).split())[:200]}
        print(json.dumps({"head": name, **rows[name]}), flush=True)
    nats = rows["full logits"].get("nats")
    if other := [n for n, row in rows.items() if nats and abs(row.get("nats", nats) / nats - 1) > 1e-3]:
        raise SystemExit(f"{', '.join(other)}: not the log-probs of the full logits")
    plain = rows["full logits"].get("ms")
    ratios = {name: row["ms"] / plain for name, row in rows.items() if plain and "ms" in row}
    best = min((row["extra_mb"] for name, row in rows.items() if "chunks" in name and "extra_mb" in row), default=None)
    told = "not measured" if best is None else f"{best:.0f} MB"
    print(f"least memory of the chunked head: {told} (goal: under 600 MB)")
    print(json.dumps({"ratios": ratios}))


if __name__ == "__main__":
    main()

"""A GPU's own count of training memory beside what ``stepkto plan`` computes: LoRA, recomputation, offloading.

    python -m benchmarks.gpu_memory                               (Llama-8B shape: 4 layers of all weights, 32 of LoRA)
    python -m benchmarks.gpu_memory --shapes tiny --device cpu    (tries the script; a CPU counts no memory)

One update and one KL pass per case, random weights and documents as in ``benchmarks.gpu_train``. Two counts of torch's
allocator: after the start (weights, gradients, optimizer), and at the peak. The plan's allowance for CUDA and NCCL is
left out, because the allocator does not see it; its 5% for fragmentation is the allocator's reserve and stays.
A ratio above 1 means that the plan promised too little. Every case is printed as one JSON object on a line; one that
cannot run here says why.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from benchmarks.gpu_train import SHAPES, Bench, Shape, add_arguments, cannot_run, documents, free_memory, settings
from benchmarks.gpu_train import start as start_rank
from benchmarks.gpu_train import stop as stop_rank
from megatron_stepkto.architectures.llama import LLAMA
from megatron_stepkto.architectures.model_config import ModelConfig
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import TrainExample
from megatron_stepkto.planning.memory import stage_memory
from megatron_stepkto.recipe.keys import Training

LORA = {"lora": {"rank": 16}, "transformer_engine": "off"}
SHARED = {"parallel": {"distributed_optimizer": True}}
# Name: layers of the 8B shape, and keys of train. Full training of more layers would need several GPUs.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "LoRA": (32, LORA),
    "LoRA, recompute": (32, {**LORA, "recompute": True}),
    "all weights": (4, {}),
    "all weights, recompute": (4, {"recompute": True}),
    "optimizer on the host": (4, {**SHARED, "optimizer": {"lr": 1e-6, "offload": 1.0}}),
    "half of the optimizer on the host": (4, {**SHARED, "optimizer": {"lr": 1e-6, "offload": 0.5}}),
    "bf16 gradients": (4, {**SHARED, "optimizer": {"lr": 1e-6, "gradient_dtype": "bfloat16"}}),
    "bf16 moments": (4, {**SHARED, "optimizer": {"lr": 1e-6, "moment_dtype": "bfloat16"}}),
    "three layers' activations on the host": (4, {"offload_layers": 3}),
}


def measure(shape: Shape, case: str, device: torch.device, **keys: Any) -> dict[str, Any]:
    """GB of 10^9 bytes, planned and counted."""
    layers, own = CASES[case]
    config = shape.config(min(layers, shape.most_layers))
    row: dict[str, Any] = {"shape": shape.name, "layers": config.num_layers, "case": case}
    try:
        chosen = settings(shape, "step_kto", device.type, **{**keys, **own})
        fill(row, config, chosen, documents(shape, 2 * shape.tokens), device)
    except (UserError, ValueError, AssertionError, torch.cuda.OutOfMemoryError) as error:
        row["not_run"] = " ".join(str(error).split())[:300]
    free_memory(device)
    return row


def fill(
    row: dict[str, Any], config: ModelConfig, chosen: Training, examples: list[TrainExample], device: torch.device
) -> None:
    on_gpu = device.type == "cuda"
    responses = sum(len(e.token_ids) for e in examples)
    plan = stage_memory(
        config, LLAMA.entries(config), chosen, 0, num_micro_batches=2, on_gpu=on_gpu,
        response_share=responses / (responses + sum(len(e.prompt_token_ids) for e in examples)),
    )  # fmt: skip
    row |= {"planned_state_gb": plan.state / 1e9, "planned_peak_gb": (plan.peak - plan.overhead) / 1e9}
    bench = Bench(config, chosen, device, examples)
    if on_gpu:
        row["state_gb"] = torch.cuda.memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
    bench.update()
    bench.kl_pass()
    if on_gpu:
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        row["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        row["ratio_state"] = row["state_gb"] / row["planned_state_gb"]
        row["ratio_peak"] = row["peak_gb"] / row["planned_peak_gb"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, ["8b"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    if reason := cannot_run(arguments):
        print(f"skipped: {reason}")
        return
    device = start_rank(arguments.device)
    for name in arguments.shapes:
        for case in arguments.cases:
            row = measure(SHAPES[name], case, device, transformer_engine=arguments.transformer_engine)
            print(json.dumps(row), flush=True)
    stop_rank()


if __name__ == "__main__":
    main()

"""Training updates of slices of large models on one GPU: bf16 and FP8, Step-KTO and supervised, packed and padded.

    python -m benchmarks.gpu_train                       (Llama-8B and Llama-70B shaped slices, as many layers as fit)
    python -m benchmarks.gpu_train --shapes 8b --cases step_kto supervised --transformer-engine off
    python -m benchmarks.gpu_train --shapes tiny --device cpu     (tries the script; the figures mean nothing)

Every case is printed as one JSON object on a line as soon as it is measured: a run that is cut short leaves some.

True hidden sizes, heads and vocabulary; random weights; documents of log-normal length. Each figure is the median over
updates after a warm-up. The matrix peak that shares refer to is measured in the same run (a large bf16 product). Model
FLOPs count every matrix product and causal attention once forward and twice backward; recomputation is not counted.
Goals on an H200: 8B-shaped bf16 at 60% of the measured peak; FP8 at 1.4 times bf16 on the 70B-shaped slice; Step-KTO
at most 1.05 times supervised, the KL forward apart. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_stepkto.architectures.adapters import adapted_linears
from megatron_stepkto.architectures.flops import forward_flops
from megatron_stepkto.architectures.llama import LLAMA
from megatron_stepkto.architectures.model_config import ModelConfig
from megatron_stepkto.base.examples import Examples
from megatron_stepkto.base.records import KLPartner, TrainExample, TrainStep
from megatron_stepkto.losses import ReferencePoints
from megatron_stepkto.megatron.acceleration import choose, choose_device, describe, find_machine
from megatron_stepkto.megatron.batch import Document, kl_document, pack_units, solution_document, with_partner
from megatron_stepkto.megatron.engine import Engine
from megatron_stepkto.megatron.ranks import join_ranks, lay_out
from megatron_stepkto.methods.objective import kl_sums
from megatron_stepkto.methods.registry import method_of
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.training.references import per_step


@dataclass(frozen=True)
class Shape:
    """A slice of a model. bytes_per_weight: bf16 weight, fp32 gradient, fp32 main weight and two moments."""

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    most_layers: int
    tokens: int
    bytes_per_weight: int = 18

    def config(self, layers: int) -> ModelConfig:
        return LLAMA.read_config({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
            "num_hidden_layers": layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.ffn, "vocab_size": self.vocabulary, "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": True,
        })  # fmt: skip

    def layers_that_fit(self, free_bytes: float) -> int:
        head_dim = self.hidden // self.heads
        layer = self.hidden * (2 * self.hidden + 2 * self.kv_heads * head_dim + 3 * self.ffn)
        activations = (
            34 * self.hidden * self.tokens
        )  # bytes of a layer, Korthikanti et al. (2205.05198), flash attention
        room = 0.85 * free_bytes - self.vocabulary * self.hidden * self.bytes_per_weight - 3e9
        return max(1, min(self.most_layers, int(room / (layer * self.bytes_per_weight + activations))))


SHAPES = {
    "8b": Shape("Llama-8B slice", 4096, 14336, 32, 8, 128_256, 32, 8192),
    "70b": Shape("Llama-70B slice", 8192, 28672, 64, 8, 128_256, 80, 4096),
    "tiny": Shape("tiny", 64, 128, 4, 2, 512, 2, 256),
}


PLAIN = "step_kto"  # the case that the others are compared with
# Name on the command line: what it is called in the table, the method, further keys of train.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    PLAIN: ("Step-KTO, bf16", "step_kto", {}),
    "supervised": ("supervised, bf16", "rft", {}),
    "padded": ("Step-KTO, bf16, padded", "step_kto", {}),
    **{
        f"fp8_{scaling}": (f"Step-KTO, FP8 {scaling}", "step_kto", {"fp8": {"scaling": scaling}})
        for scaling in ("current", "delayed", "blockwise")
    },
}


def documents(shape: Shape, total: int) -> list[TrainExample]:
    """Solutions of log-normal length (an eighth of a micro-batch on average), about ``total`` tokens."""
    rng = random.Random(0)
    made: list[TrainExample] = []
    while sum(len(e.prompt_token_ids) + len(e.token_ids) for e in made) < total:
        length = min(shape.tokens // 2, max(16, int(rng.lognormvariate(0, 0.5) * shape.tokens / 8)))
        prompt, response = length // 4, length - length // 4
        cuts = [response * i // 4 for i in range(5)]
        steps = [TrainStep(token_start=a, token_end=b, label=rng.choice([1, 0])) for a, b in itertools.pairwise(cuts)]
        ids = [rng.randrange(shape.vocabulary) for _ in range(length)]
        made.append(TrainExample(example_id=f"e{len(made)}", problem_id=f"p{len(made)}", prompt_token_ids=ids[:prompt],
                                 token_ids=ids[prompt:], steps=steps, outcome=rng.choice([1, 0])))  # fmt: skip
    return [
        e.model_copy(update={"kl_partner": KLPartner(example_id=o.example_id, token_ids=o.token_ids, steps=o.steps)})
        for e, o in zip(made, made[1:] + made[:1], strict=True)
    ]


def settings(shape: Shape, method: str, device: str, **changes: Any) -> recipe.Training:
    return recipe.Training.model_validate({
        "method": method, "optimizer": {"lr": 1e-6}, "global_batch_size": 8, "micro_batch_tokens": shape.tokens,
        "dtype": "bfloat16", "device": device, **changes,
    })  # fmt: skip


class Bench:
    """An engine with random weights, and updates of the given documents."""

    def __init__(
        self, config: ModelConfig, chosen: recipe.Training, device: torch.device, examples: list[TrainExample]
    ):
        self.device, self.examples = device, examples
        adapted = adapted_linears(LLAMA.entries(config), chosen.lora.targets) if chosen.lora else None
        self.engine = Engine(config, chosen, device, choose(chosen, find_machine(device)), adapted=adapted)
        generator = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for policy in self.engine.policies:
                for weight in policy.parameters():
                    weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(0, 0.02, generator=generator)
        self.engine.optimizer.reload_model_params()
        method = method_of(chosen.method)
        mapped = Examples.of(examples)
        indices = np.arange(len(mapped))
        self.objective = method.objective(chosen.loss, mapped, indices)
        self.units = [tuple(self.known(solution_document(mapped, i)) for i in unit) for unit in method.units(mapped)]
        with_kl = method.estimator(chosen.loss) == "mismatched"
        self.pairs = [self.known(kl_document(mapped, i)) for i in with_partner(mapped, indices)] if with_kl else []
        zero = torch.zeros((), device=device)
        self.points = ReferencePoints(zero, zero)

    @staticmethod
    def known(document: Document) -> Document:
        return replace(document, reference=torch.zeros(document.num_steps))

    def update(self) -> None:
        batches = pack_units(self.units, self.engine.slot())

        def loss(batch: Any, log_probs: torch.Tensor) -> tuple[torch.Tensor, int, dict[str, torch.Tensor]]:
            result = self.objective.loss(batch, log_probs, self.points)
            return result.total, result.num_units, {}

        self.engine.accumulate(batches, loss)
        self.engine.step(1e-6)

    def kl_pass(self) -> None:
        self.engine.score(pack_units([[pair] for pair in self.pairs], self.engine.slot()), kl_sums)

    def reference_pass(self) -> None:
        self.engine.score(pack_units(self.units, self.engine.slot()), per_step)

    def tokens(self) -> int:
        return sum(len(d) for unit in self.units for d in unit)

    def flops(self, config: ModelConfig) -> float:
        total = 0.0
        for document in (d for unit in self.units for d in unit):
            layer, head = forward_flops(config, len(document), len(document.response), len(document))
            total += 3 * (config.num_layers * layer + head)
        return total


def seconds(work: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Median of ``repeats`` after two warm-ups; every one waits for the device."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    found = []
    for number in range(repeats + 2):
        wait()
        begun = time.perf_counter()
        work()
        wait()
        if number >= 2:
            found.append(time.perf_counter() - begun)
    return statistics.median(found)


def matrix_peak(device: torch.device, repeats: int) -> float:
    """FLOP/s of a large bf16 product: what this GPU reaches, not what its data sheet says."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, b), device, 3) for _ in range(repeats))


def measure(
    shape: Shape, cases: Sequence[str], device: torch.device, repeats: int, peak: float, **keys: Any
) -> list[dict[str, Any]]:
    """A row per case. keys: of train, for all of them."""
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else 1e9
    config = shape.config(shape.layers_that_fit(free))
    examples = documents(shape, 4 * shape.tokens)
    longest = max(len(e.prompt_token_ids) + len(e.token_ids) for e in examples)
    rows = []
    for case in cases:
        name, method, own = CASES[case]
        if case == "padded":
            own = {"pad_documents_to": -(-longest // 16) * 16}
        chosen = settings(shape, method, device.type, **keys, **own)
        # RFT trains on right solutions alone: give every method the same documents.
        same = [e.model_copy(update={"outcome": 1}) for e in examples] if method == "rft" else examples
        row: dict[str, Any] = {"shape": shape.name, "layers": config.num_layers, "case": name}
        bench: Bench | None = None
        try:
            bench = Bench(config, chosen, device, same)
            row["update_s"] = seconds(bench.update, device, repeats)
            row["tokens_per_s"] = bench.tokens() / row["update_s"]
            row["tflops"] = bench.flops(config) / row["update_s"] / 1e12
            row["share_of_peak"] = row["tflops"] * 1e12 / peak
            if case == PLAIN:
                row["kl_pass_s"] = seconds(bench.kl_pass, device, 2)
                row["reference_pass_s"] = seconds(bench.reference_pass, device, 2)
            if device.type == "cuda":
                row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
                torch.cuda.reset_peak_memory_stats()
        except Exception as error:  # a case that this machine cannot run says why, and the others go on
            row["not_run"] = (str(error).splitlines() or [type(error).__name__])[0][:200]
        bench = None  # a case that ran out of memory must not hold it while the next one starts
        free_memory(device)
        rows.append(row)
        print(line(row))
        print(json.dumps(row), flush=True)
    return rows


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def line(row: dict[str, Any]) -> str:
    head = f"{row['shape']} ({row['layers']} layers)  {row['case']:26}"
    if "not_run" in row:
        return f"{head} not run: {row['not_run']}"
    passes = (
        f"  KL pass {row['kl_pass_s']:.3f} s, reference pass {row['reference_pass_s']:.3f} s"
        if "kl_pass_s" in row
        else ""
    )
    return (
        f"{head} {row['update_s']:8.3f} s {row['tokens_per_s']:9,.0f} tokens/s {row['tflops']:7.1f} TFLOP/s "
        f"{row['share_of_peak']:6.1%} of the measured peak{passes}"
    )


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for shape in dict.fromkeys(row["shape"] for row in rows):
        by = {row["case"]: row for row in rows if row["shape"] == shape and "update_s" in row}
        plain = by.get(CASES[PLAIN][0])
        if plain is None:
            continue
        for name, row in by.items():
            if "FP8" in name or "padded" in name:
                found[f"{shape}: {name.removeprefix('Step-KTO, ')} over bf16"] = plain["update_s"] / row["update_s"]
        if supervised := by.get(CASES["supervised"][0]):
            found[f"{shape}: over_supervised"] = plain["update_s"] / supervised["update_s"]
    return found


def goals(rows: Sequence[dict[str, Any]], found: dict[str, float]) -> list[str]:
    """Each goal beside what was measured."""
    shape, case = SHAPES["8b"].name, CASES[PLAIN][0]
    share = next((r.get("share_of_peak") for r in rows if r["shape"] == shape and r["case"] == case), None)
    fp8 = max((v for k, v in found.items() if k.startswith(SHAPES["70b"].name) and "FP8" in k), default=None)
    supervised = [value for name, value in found.items() if "over_supervised" in name]
    told = [
        ("8B slice in bf16, share of the measured peak", share, ">= 0.60"),
        ("70B slice, best FP8 over bf16", fp8, ">= 1.40"),
        ("Step-KTO over supervised, seconds, largest", max(supervised, default=None), "<= 1.05"),
    ]
    return [f"{name}: {'not run' if value is None else f'{value:.3f}'} (goal {goal})" for name, value, goal in told]


def add_arguments(parser: argparse.ArgumentParser, shapes: Sequence[str]) -> None:
    """shapes: the default."""
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(shapes))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--transformer-engine", choices=["auto", "required", "off"], default="auto")


def start(device_name: str) -> torch.device:
    """One rank on the device, ready for engines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = choose_device(device_name)
    join_ranks(recipe.Parallel(), device, 600)
    lay_out(recipe.Parallel(), 600)
    return device


def stop() -> None:
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def cannot_run(arguments: argparse.Namespace) -> str | None:
    """Why not on this machine."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU (--shapes tiny --device cpu tries the script)"
    if arguments.transformer_engine == "required":
        found = find_machine(torch.device(arguments.device)).transformer_engine
        if found.version is None:
            return f"Transformer Engine is {found.reason}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, ["8b", "70b"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    if reason := cannot_run(arguments):
        print(f"skipped: {reason}")
        return
    device = start(arguments.device)
    keys = {"transformer_engine": arguments.transformer_engine}
    machine = find_machine(device)
    print(describe(choose(settings(SHAPES["tiny"], "step_kto", arguments.device, **keys), machine), machine))
    peak = matrix_peak(device, arguments.repeats)
    print(json.dumps({"peak_tflops": peak / 1e12}), flush=True)
    rows = [
        row
        for name in arguments.shapes
        for row in measure(SHAPES[name], arguments.cases, device, arguments.repeats, peak, **keys)
    ]
    print("\n".join(goals(rows, ratios(rows))))
    print(json.dumps({"ratios": ratios(rows)}))
    stop()


if __name__ == "__main__":
    main()

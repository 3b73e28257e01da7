"""Memory and time of training data: the dataset stage, the start of a rank, and one epoch of batches.

    python -m benchmarks.data_scale                              # 20,000 and 200,000 solutions, 8 of a problem
    python -m benchmarks.data_scale --solutions 2000 20000       # a quick look

Solutions are random tokens of log-normal length (mean 900, sigma 0.6, at most 2,048) in steps of 45 tokens on average,
with text of three characters a token: judged.jsonl as ``stepkto judge`` writes it. Each part runs in a process of its
own:

    dataset     ``build_dataset`` for Step-KTO; peak of the resident memory
    rank        ``make_trainer`` on a model of two thin layers; reference log-probs are written as a pass would, but are
                zeros; then every micro-batch of one epoch is built, 8,192 tokens each, 64 solutions an update

A rank's memory is its private one (RssAnon), the peak of samples every 10 ms: pages of mapped files are shared by the
ranks of a node and freed when memory is short; they are given apart (RssFile at the end). The last line is JSON;
``rank_memory_growth`` is the rank's peak at the most over that at the fewest solutions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_stepkto.base.stage import package_versions

MEAN, SIGMA, LONGEST, STEP = 900, 0.6, 2048, 45
VOCABULARY, SAMPLES, PROMPT = 32_000, 8, 120


def write_judged(path: Path, solutions: int, vocabulary: int = VOCABULARY) -> None:
    numbers, lengths = np.random.default_rng(0), random.Random(0)
    text = "We add 17 and 25, so the total is 42 apples. " * 200
    with path.open("w") as file:
        for problem in range(solutions // SAMPLES):
            prompt = numbers.integers(3, vocabulary, PROMPT).tolist()
            for k in range(SAMPLES):
                length = min(LONGEST, max(16, round(lengths.lognormvariate(math.log(MEAN) - SIGMA**2 / 2, SIGMA))))
                bounds = [*range(0, max(1, length - STEP // 2), STEP), length]
                steps = [
                    {"start": 3 * a, "end": 3 * b, "token_start": a, "token_end": b, "label": lengths.choice([1, 1, 0])}
                    for a, b in itertools.pairwise(bounds)
                ]
                row = {
                    "problem_id": f"p{problem}", "sample_id": f"p{problem}/{k}", "prompt_token_ids": prompt,
                    "token_ids": numbers.integers(3, vocabulary, length).tolist(), "text": text[: 3 * length],
                    "finish_reason": "stop", "steps": steps, "outcome": lengths.choice([1, 0]),
                    "judge": {"outcome": "answer", "process": "equations"},
                }  # fmt: skip
                file.write(json.dumps(row) + "\n")


def dataset(folder: Path) -> dict[str, Any]:
    from megatron_stepkto.methods.dataset import build_dataset
    from megatron_stepkto.recipe.keys import Dataset

    begun = time.perf_counter()
    counts = build_dataset(folder / "judged.jsonl", folder / "train", None, Dataset(), "step_kto", 0.0, seed=0)
    return {
        "dataset_seconds": time.perf_counter() - begun,
        "dataset_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "examples": counts["examples"],
        "tokens": counts["tokens"],
        "judged_gb": (folder / "judged.jsonl").stat().st_size / 1e9,
        "columns_gb": sum(path.stat().st_size for path in (folder / "train").iterdir()) / 1e9,
    }


def memory(kind: str) -> float:
    """GB of this process: RssAnon or RssFile."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[kind].split()[0]) * 1024 / 1e9


class Peak(threading.Thread):
    """Follows this process's private memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.found = 0.0
        self.start()

    def run(self) -> None:
        while True:
            self.found = max(self.found, memory("RssAnon"))
            time.sleep(0.01)


def rank(folder: Path) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_stepkto.checkpoints.convert import hf_to_megatron
    from megatron_stepkto.megatron import patches
    from megatron_stepkto.recipe import keys as recipe
    from megatron_stepkto.training.job import Job
    from megatron_stepkto.training.rank import make_trainer

    settings = recipe.Training.model_validate({
        "method": "step_kto", "optimizer": {"lr": 1e-6}, "global_batch_size": 64, "micro_batch_tokens": 8192,
        "dtype": "float32", "device": "cpu", "log": {"tensorboard": False},
    })  # fmt: skip
    shape = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=VOCABULARY, **shape)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    hf_to_megatron(folder / "model", folder / "initial", torch.float32)
    job = Job(settings=settings, seed=0, initial=folder / "initial", reference=None, train_examples=folder / "train",
              held_out_examples=None, directory=folder, fingerprint="benchmark")  # fmt: skip
    patches.install()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    peak = Peak()
    time.sleep(0.1)
    before = peak.found
    begun = time.perf_counter()
    trainer = make_trainer(job, torch.device("cpu"))
    start = time.perf_counter() - begun

    def score(_: str, documents: Any, what: Any, take: Any, **__: Any) -> None:
        for number, steps in enumerate(documents.num_steps):
            take(number, torch.zeros(steps, dtype=torch.float64))

    trainer._score = score  # type: ignore[method-assign]
    begun = time.perf_counter()
    trainer._find_references()
    references = time.perf_counter() - begun
    begun = time.perf_counter()
    batches = 0
    for update in trainer.updates:
        made = trainer._global_batch(update)
        batches += len(made.batches) + len(made.kl_batches)
    epoch = time.perf_counter() - begun
    return {
        "start_seconds": start,
        "references_seconds": references,
        "epoch_seconds": epoch,
        "ms_per_micro_batch": 1000 * epoch / batches,
        "rank_memory_gb": peak.found,
        "rank_memory_before_data_gb": before,
        "rank_mapped_gb": memory("RssFile"),
    }


PARTS = {"dataset": dataset, "rank": rank}


def measure(solutions: int, folder: Path) -> dict[str, Any]:
    write_judged(folder / "judged.jsonl", solutions)
    found: dict[str, Any] = {"solutions": solutions}
    for part in PARTS:
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "benchmarks.data_scale",
            "--part",
            part,
            "--folder",
            str(folder),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found |= json.loads(done.stdout.splitlines()[-1])
    print("  ".join(f"{key} {value:,.3g}" if isinstance(value, float) else f"{key} {value:,}"
                    for key, value in found.items()), flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solutions", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](arguments.folder)))
        return
    rows = []
    for solutions in arguments.solutions:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(solutions, Path(folder)))
    few, most = (pick(rows, key=lambda row: row["solutions"]) for pick in (min, max))
    summary = {
        "rank_memory_growth": most["rank_memory_gb"] / few["rank_memory_gb"],
        "dataset_memory_gb": most["dataset_memory_gb"],
        "start_seconds": most["start_seconds"],
        "rows": rows,
        "versions": package_versions(),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

"""One iteration of a recipe on a GPU in bf16, with the seconds of every stage.

    python -m benchmarks.gpu_loop mini        (recipes/mini_cpu.yaml; its curve must be that of the CPU)
    python -m benchmarks.gpu_loop smollm2     (recipes/smollm2_135m_word_problems_cpu.yaml, if what it reads is there)
    python -m benchmarks.gpu_loop mini --device cpu --short     (tries the script with few problems)

vLLM samples where it is installed, else transformers. Every finished stage is one JSON object on a line, then
pass@1 before and after. On the CPU one iteration of the mini recipe takes pass@1 from 0.50 to 0.94, and the share of
right answers with a wrong step from 0.40 to 0.13; on the GPU pass@1 must come within 0.06 of that, and the share must
fall to 0.6 of the first or less.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"mini": "mini_cpu", "smollm2": "smollm2_135m_word_problems_cpu"}
CPU_PASS_AT_1 = 0.94  # of the mini recipe after one iteration (README.md, M1)
POLL_S = 0.2


def missing_inputs(name: str) -> str | None:
    """What the recipe needs and is not here."""
    if name == "mini":
        return None
    models = Path(os.environ.get("STEPKTO_REAL_MODELS", ROOT / "build" / "real_models"))
    needed = [models / "smollm2-135m" / "config.json", ROOT / "build" / "word_problems" / "train.jsonl"]
    absent = [str(path) for path in needed if not path.is_file()]
    return f"{', '.join(absent)}: not there (the recipe's first lines say how to make it)" if absent else None


def has_vllm() -> bool:
    return bool(importlib.util.find_spec("vllm") or os.environ.get("STEPKTO_SAMPLE_PYTHON"))


def settings(name: str, output: Path, device: str, short: bool) -> dict[str, Any]:
    """Keys that differ from the recipe's."""
    on_gpu = device == "cuda"
    keys: dict[str, Any] = {
        "output": str(output), "name": name, "iterations": 1, "sample.workers": 1,
        "sample.backend": "vllm" if has_vllm() else "transformers",
        "sample.dtype": "bfloat16" if on_gpu else "float32", "train.device": device, "train.dtype": "bfloat16",
        "train.parallel": "{ranks: 1}", "evaluate.num_problems": 200, "evaluate.k": 2,
    }  # fmt: skip
    if name == "smollm2":
        # On most CPUs bf16 products of this size take minutes.
        dtype = "bfloat16" if on_gpu else "float32"
        keys |= {"warm_up.training.parallel": "{ranks: 1}", "warm_up.training.device": device, "train.dtype": dtype,
                 "warm_up.training.dtype": dtype, "warm_up.training.micro_batch_tokens": 8192,
                 "train.micro_batch_tokens": 8192, "problems.per_iteration": 48,
                 "evaluate.num_problems": 32}  # fmt: skip  # of each of two sets
    if short:
        keys |= {"problems.per_iteration": 16, "evaluate.num_problems": 16, "sample.num_samples": 4}
        if name == "smollm2":
            keys |= {"warm_up.training.max_updates": 1, "warm_up.training.global_batch_size": 8,
                     "warm_up.training.micro_batch_tokens": 512, "train.micro_batch_tokens": 512,
                     "sample.max_tokens": 32}  # fmt: skip
    return keys


def finished_stages(run: Path, seen: set[Path]) -> Iterator[dict[str, Any]]:
    """Stages whose manifest is new."""
    for path in sorted(run.glob("**/manifest.json"), key=lambda p: p.stat().st_mtime):
        if path not in seen:
            seen.add(path)
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if "seconds" in manifest:
                yield {"stage": str(path.parent.relative_to(run)), "seconds": manifest["seconds"],
                       "counts": manifest.get("counts", {})}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--short", action="store_true", help="few problems: the figures mean nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu_loop", help="the run is made again there")
    arguments = parser.parse_args()
    if reason := missing_inputs(arguments.recipe):
        print(f"skipped: {reason}")
        return
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("skipped: torch sees no NVIDIA GPU (--device cpu --short tries the script)")
            return
    keys = settings(arguments.recipe, arguments.output.resolve(), arguments.device, arguments.short)
    run = arguments.output.resolve() / arguments.recipe
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-W", "ignore", "-m", "megatron_stepkto", "run",
               str(ROOT / "recipes" / f"{RECIPES[arguments.recipe]}.yaml")]  # fmt: skip
    command += [argument for key, value in keys.items() for argument in ("--set", f"{key}={value}")]
    print(json.dumps({"recipe": RECIPES[arguments.recipe], "sampler": keys["sample.backend"]}), flush=True)
    process = subprocess.Popen(command, cwd=ROOT)
    seen: set[Path] = set()
    running = True
    while running:
        running = process.poll() is None
        for stage in finished_stages(run, seen):
            print(json.dumps(stage), flush=True)
        time.sleep(POLL_S if running else 0)
    if process.returncode:
        raise SystemExit(process.returncode)
    before, after = json.loads((run / "summary.json").read_text(encoding="utf-8"))["iterations"]
    shares = [row["wrong_step_share_of_correct"] for row in (before, after)]
    figures = {"pass_at_1": [before["pass_at_1"], after["pass_at_1"]], "wrong_step_share_of_correct": shares}
    print(json.dumps(figures))
    off = abs(after["pass_at_1"] - CPU_PASS_AT_1) > 0.06 or shares[1] > 0.6 * shares[0]
    if arguments.recipe == "mini" and not arguments.short and off:
        raise SystemExit(f"not the curve of the CPU (pass@1 {CPU_PASS_AT_1} after one iteration)")


if __name__ == "__main__":
    main()

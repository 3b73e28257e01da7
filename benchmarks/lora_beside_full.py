"""Training all weights of a small model beside training adapters alone (LoRA): speed and memory in one run on a CPU.

    python -m benchmarks.lora_beside_full MODEL [--repeats 3]

MODEL is a Hugging Face folder of the Llama family, such as SmolLM2-135M; only its shape counts. Each case has a process
of its own, on all cores. Float32, documents of log-normal length as in benchmarks.gpu_train, 1,024 tokens an update.
``state_gb`` is what the engine added to the process before the first update, ``peak_gb`` the most during updates, both
above what the imports take. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_train import Bench, Shape, documents, seconds, start, stop
from benchmarks.logprob_head import resident_bytes
from megatron_stepkto.checkpoints.convert import read_model_config
from megatron_stepkto.recipe.keys import Training

CASES: dict[str, dict[str, Any]] = {"all weights": {}, "LoRA, rank 16": {"lora": {"rank": 16}}}
UPDATE_TOKENS, MICRO_BATCH_TOKENS = 1024, 512


def measure(model: Path, case: str, repeats: int) -> dict[str, Any]:
    config, _ = read_model_config(model)
    device = start("cpu")
    shape = Shape(model.name, config.hidden_size, config.ffn_size, 1, 1, config.vocab_size, 1, MICRO_BATCH_TOKENS)
    examples = documents(shape, UPDATE_TOKENS)
    chosen = Training.model_validate({
        "method": "step_kto", "optimizer": {"lr": 1e-6}, "global_batch_size": 8, "device": "cpu",
        "micro_batch_tokens": MICRO_BATCH_TOKENS, **CASES[case],
    })  # fmt: skip
    before = resident_bytes("VmRSS")
    bench = Bench(config, chosen, device, examples)
    state = (resident_bytes("VmRSS") - before) / 1e9
    update = seconds(bench.update, device, repeats)
    peak = (resident_bytes("VmHWM") - before) / 1e9
    trained = sum(p.numel() for policy in bench.engine.policies for p in policy.parameters() if p.requires_grad)
    tokens = bench.tokens()
    stop()
    return {
        "case": case, "trained": trained, "tokens": tokens, "update_s": round(update, 2),
        "tokens_per_s": round(tokens / update, 1), "state_gb": round(state, 2), "peak_gb": round(peak, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.model, arguments.case, arguments.repeats)))
        return
    rows = []
    for case in CASES:
        command = [sys.executable, "-m", __spec__.name, str(arguments.model), "--repeats", str(arguments.repeats)]
        done = subprocess.run([*command, "--case", case], stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    full, lora = rows
    print(
        json.dumps({
            "speed": round(lora["tokens_per_s"] / full["tokens_per_s"], 2),
            "peak_memory": round(lora["peak_gb"] / full["peak_gb"], 2),
            "rows": rows,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()

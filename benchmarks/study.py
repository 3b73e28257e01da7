"""The knobs that the paper leaves open, and label noise, on the miniature: one knob changed at a time, several seeds.

python -m benchmarks.study run [--recipe recipes/mini_cpu.yaml] [--seeds 0,1,2] [--only NAME,...] [--output runs/study]
python -m benchmarks.study table [--output runs/study]

Every run has the same sample budget, which is smaller than the demo's: 160 problems an iteration. ``run`` goes on where it was
stopped. Variants of one seed share M0, its evaluation and the first iteration's samples with the base run of that seed.
``table`` prints means over seeds, and writes ``study.svg``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

BUDGET = ("problems.per_iteration=160", "evaluate.num_problems=1000", "evaluate.k=1", "sample.workers=1")
LOSS = "train.loss."
VARIANTS: dict[str, tuple[str, ...]] = {
    "base": (),
    "kto": ("train.method=kto",),
    "flip 10%": ("dataset.flip_step_labels=0.1",),
    "flip 20%": ("dataset.flip_step_labels=0.2",),
    "flip 30%": ("dataset.flip_step_labels=0.3",),
    "steps summed": (f"{LOSS}step_reduction=sum",),
    "beta_step 0.5": (f"{LOSS}beta_step=0.5",),
    "beta_step 8": (f"{LOSS}beta_step=8",),
    "undesirable 0.25": (f"{LOSS}undesirable_weight_outcome=0.25", f"{LOSS}undesirable_weight_step=0.25"),
    "undesirable 1": (f"{LOSS}undesirable_weight_outcome=1", f"{LOSS}undesirable_weight_step=1"),
    "z: batch": (f"{LOSS}reference_point=batch",),
    "z: none": (f"{LOSS}reference_point=none", "dataset.kl_pair_share=0"),
    "reference: initial": ("train.reference=initial",),
    "drop after error": ("judge.after_first_error=drop",),
}
SHARED = ("evaluate/problems", "evaluate/M0", "iteration_1/problems", "iteration_1/sample")
FIGURES = {
    "pass_at_1": "pass@1",
    "cot_pass_at_1": "CoT-pass@1",
    "wrong_step_share_of_correct": "right answers with a wrong step",
    "wrong_step_rate_in_correct": "wrong steps in right answers",
}


def folder_of(output: Path, variant: str, seed: int) -> Path:
    return output / f"{variant.replace('%', '').replace(': ', '_').replace(' ', '_')}-{seed}"


def run(recipe: Path, seeds: list[int], names: list[str], output: Path) -> None:
    for seed in seeds:
        base = folder_of(output, "base", seed)
        for name in names:
            folder = folder_of(output, name, seed)
            if (folder / "summary.json").is_file():
                continue
            if name != "base" and not folder.exists():
                for part in SHARED:
                    shutil.copytree(base / part, folder / part)
            print(f"{name}, seed {seed}", flush=True)
            sets = (*BUDGET, *VARIANTS[name], f"seed={seed}", f"name={folder.name}", f"output={output.resolve()}")
            command = [sys.executable, "-m", "megatron_stepkto", "run", str(recipe), *(f"--set={key}" for key in sets)]
            if code := subprocess.call(command):
                sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/mini_cpu.yaml"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=",".join(VARIANTS), metavar="NAME,...")
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    if arguments.command == "run":
        run(arguments.recipe, seeds, ["base", *(n for n in arguments.only.split(",") if n != "base")], arguments.output)


if __name__ == "__main__":
    main()

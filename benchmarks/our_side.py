"""One epoch of this package's trainer over the rows, in file order; prints one line of JSON."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.workload import BATCH, BETA, LEARNING_RATE, Row, peak_memory_mb, read_rows
from megatron_stepkto.base.examples import write_examples
from megatron_stepkto.base.files import stable_hash
from megatron_stepkto.base.records import KLPartner, TrainExample, TrainStep
from megatron_stepkto.checkpoints.convert import hf_to_megatron
from megatron_stepkto.megatron.acceleration import choose_device
from megatron_stepkto.megatron.ranks import join_ranks
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.training.job import Job
from megatron_stepkto.training.loop import Trainer
from megatron_stepkto.training.rank import make_trainer

STEPS = 8


def note_seconds(trainer: Trainer, method: str) -> list[tuple[float, float]]:
    """Have ``method`` note the (wall-clock, processor) seconds of each call, all of its logging included."""
    noted: list[tuple[float, float]] = []
    original = getattr(trainer, method)

    def timed(*args: Any) -> Any:
        wall, processor = time.perf_counter(), time.process_time()
        result = original(*args)
        noted.append((time.perf_counter() - wall, time.process_time() - processor))
        return result

    setattr(trainer, method, timed)
    return noted


def examples_of(rows: list[Row], method: str, kl_share: float) -> list[TrainExample]:
    """The rows as training examples; ``kl_share`` of them carry a KL pair, chosen as dataset.kl_pair_share does.

    Step-KTO: eight steps per completion, three of four right. KTO: one step, not judged. RFT: all are right.

    The KL partner of row i is row i - 1 of its batch (row 0's is the last), as in TRL.
    """

    def steps(row: Row) -> list[TrainStep]:
        size = len(row.completion)
        if method != "step_kto":
            return [TrainStep(token_start=0, token_end=size, label=None)]
        cuts = [size * i // STEPS for i in range(STEPS + 1)]
        return [TrainStep(token_start=a, token_end=b, label=int(i % 4 < 3)) for i, (a, b) in enumerate(pairwise(cuts))]

    made = []
    for index, row in enumerate(rows):
        first = index - index % BATCH
        size = min(BATCH, len(rows) - first)
        other = first + (index - first - 1) % size
        made.append(
            TrainExample(
                example_id=f"row{index}",
                problem_id=f"row{index}",
                prompt_token_ids=row.prompt,
                token_ids=row.completion,
                steps=steps(row),
                outcome=1 if method == "rft" else int(row.label),
                kl_partner=KLPartner(
                    example_id=f"row{other}", token_ids=rows[other].completion, steps=steps(rows[other])
                )
                if stable_hash(0, "kl", f"row{index}") / 2**64 < kl_share
                else None,
            )
        )
    return made


def settings(method: str) -> recipe.Training:
    return recipe.Training.model_validate(
        {
            "method": method,
            "optimizer": {"lr": LEARNING_RATE, "beta2": 0.999, "clip_grad": 1.0},
            "loss": {"beta_outcome": BETA, "beta_step": BETA},
            "global_batch_size": BATCH,
            "micro_batch_tokens": 4096,
            "device": "cpu",
            "checkpoint_every": 1000,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--method", choices=["kto", "step_kto", "rft"], required=True)
    parser.add_argument("--kl-share", type=float, default=1.0)
    arguments = parser.parse_args()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    rows = read_rows(arguments.rows)
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    job = Job(
        settings=settings(arguments.method),
        seed=0,
        initial=arguments.work / "initial",
        reference=None,
        train_examples=arguments.work / "train",
        held_out_examples=None,
        directory=arguments.work,
        fingerprint="benchmark",
    )
    hf_to_megatron(arguments.model, job.initial, None)
    write_examples(job.train_examples, examples_of(rows, arguments.method, arguments.kl_share))
    device = choose_device("cpu")
    join_ranks(job.settings.parallel, device, job.settings.timeout_s)
    trainer = make_trainer(job, device)
    trainer.updates = [list(range(i, min(i + BATCH, len(rows)))) for i in range(0, len(rows), BATCH)]
    updates, kl, reference = (
        note_seconds(trainer, name) for name in ("_update", "_reference_points", "_find_references")
    )
    trainer.run()
    log = [json.loads(line) for line in job.metrics.read_text().splitlines()]
    print(
        json.dumps(
            {
                "updates": len(trainer.updates),
                "update_s": [wall for wall, _ in updates],
                "update_cpu_s": [processor for _, processor in updates],
                "kl_forward_s": [wall for wall, _ in kl],
                "kl_forward_cpu_s": [processor for _, processor in kl],
                "reference_s": sum(wall for wall, _ in reference),
                "reference_cpu_s": sum(processor for _, processor in reference),
                "peak_mb": round(peak_memory_mb()),
                "losses": [row["loss"] for row in log],
                "grad_norms": [row["grad_norm"] for row in log],
                "kl": [row["kl_outcome"] for row in log],
                "padding_share": max(row["padding_share"] for row in log),
            }
        )
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

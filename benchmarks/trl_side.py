"""One epoch of TRL's KTOTrainer over the rows, in file order; prints one line of JSON.

It writes the reference pass of ``precompute_ref_log_probs`` apart. The rows reach TRL as text, which its tokenizer
turns back into the same ids (checked).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import KTOConfig, KTOTrainer

from benchmarks.workload import BATCH, BETA, LEARNING_RATE, peak_memory_mb, read_rows, text_of


class TimedTrainer(KTOTrainer):
    """Notes the wall-clock and processor seconds of the reference pass."""

    reference_seconds = reference_cpu_seconds = 0.0

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        wall, processor = time.perf_counter(), time.process_time()
        made = super()._precompute_ref_logps(*args, **kwargs)
        self.reference_seconds += time.perf_counter() - wall
        self.reference_cpu_seconds += time.process_time() - processor
        return made


class StepTimes(TrainerCallback):
    """Wall-clock and processor seconds of each update, with its logging and the making of its batch."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    def seconds(self, clock: int) -> list[float]:
        return [b[clock] - a[clock] for a, b in pairwise(self.marks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--precompute", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_rows(arguments.rows)
    # The trainer appends the end token to a completion by itself.
    dataset = Dataset.from_list(
        [
            {"prompt": text_of(row.prompt), "completion": " " + text_of(row.completion[:-1]), "label": row.label}
            for row in rows
        ]
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = KTOConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            beta=BETA,
            max_grad_norm=1.0,
            optim="adamw_torch",
            gradient_checkpointing=False,
            precompute_ref_log_probs=arguments.precompute,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        times = StepTimes()
        trainer = TimedTrainer(
            model=str(arguments.model),
            args=config,
            train_dataset=dataset,
            processing_class=AutoTokenizer.from_pretrained(arguments.model),
            callbacks=[times],
        )
        for ours, theirs in zip(rows, trainer.train_dataset, strict=True):
            assert theirs["prompt_ids"] == ours.prompt, "the text does not round-trip"
            assert theirs["completion_ids"] == ours.completion, "the text does not round-trip"
        for first in range(0, len(rows), BATCH):
            batch = rows[first : first + BATCH]
            for place, row in enumerate(batch):
                partner = trainer.train_dataset[first + batch.index(row)]["KL_completion_ids"]
                assert partner == batch[place - 1].completion, "TRL pairs otherwise than this benchmark does"
        assert next(trainer.model.parameters()).dtype == torch.float32
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
    print(
        json.dumps(
            {
                "trl": importlib.metadata.version("trl"),
                "updates": trainer.state.global_step,
                "update_s": times.seconds(0),
                "update_cpu_s": times.seconds(1),
                "reference_s": trainer.reference_seconds,
                "reference_cpu_s": trainer.reference_cpu_seconds,
                "peak_mb": round(peak_memory_mb()),
                "losses": [entry["loss"] for entry in log],
                "grad_norms": [entry["grad_norm"] for entry in log],
                "kl": [entry["kl"] for entry in log],
            }
        )
    )


if __name__ == "__main__":
    main()

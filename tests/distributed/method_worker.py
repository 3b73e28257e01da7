"""One rank of ``test_methods``: registers a method that only this file knows, and trains a list of jobs.

``torchrun -m tests.distributed.method_worker JOBS``. A job whose folder is named "resumed" is asked to stop in its
second update, by a signal as from Slurm, and continued by a new trainer from its checkpoint.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_stepkto.base.examples import Examples, Indices
from megatron_stepkto.base.processes import STOPPED, child_main
from megatron_stepkto.losses import RIGHT, Balance, LossSum, ReferencePoints
from megatron_stepkto.megatron.batch import MicroBatch
from megatron_stepkto.megatron.ranks import join_ranks
from megatron_stepkto.methods.method import Method, Metrics
from megatron_stepkto.methods.objective import solutions_of
from megatron_stepkto.methods.registry import METHODS
from megatron_stepkto.methods.select import Candidates, Chosen, single_examples, with_outcome
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.training.job import Job
from megatron_stepkto.training.loop import GlobalBatch, Trainer
from megatron_stepkto.training.rank import make_trainer
from tests.distributed.layout_worker import whole_weights


@dataclass(frozen=True)
class LinearObjective:
    betas: tuple[float, float] = (1.0, 1.0)
    balance: Mapping[str, Balance] = field(default_factory=dict)

    def loss(self, batch: MicroBatch, token_log_probs: Tensor, points: ReferencePoints) -> LossSum:
        solutions = solutions_of(batch, token_log_probs)
        sign = torch.where(solutions.outcome_label == RIGHT, 1.0, -1.0)
        total = -(sign * solutions.log_ratio()).sum()
        return LossSum(total, len(batch.documents), {"loss_linear": total.detach(), "longest": sign.new_tensor(3.0)})


class Linear(Method):
    """-r of a right solution, r of a wrong one."""

    name = "linear"
    title = "Linear"
    source = "this file"
    needs = "a sample with a judged outcome"
    loss_keys = frozenset()
    dataset_keys = frozenset({"max_tokens", "max_examples_per_problem"})
    metrics: ClassVar[Metrics] = {
        "loss_linear": ("loss_linear", "units"),
        "three_per_micro_batch": ("longest", "units"),
    }
    against_collapse = "optimizer.lr"

    def select(self, by_problem: Candidates, settings: recipe.Dataset, seed: int) -> list[Chosen]:
        return single_examples(with_outcome(by_problem), settings, seed, kl_pairs=False)

    def objective(self, loss: recipe.Loss, examples: Examples, used: Indices) -> LinearObjective:
        return LinearObjective()


def stop_in_update(trainer: Trainer, number: int) -> None:
    update = trainer._update

    def signalled(done: int, prepared: Iterator[GlobalBatch]) -> None:
        if done + 1 == number and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        update(done, prepared)

    trainer._update = signalled  # type: ignore[method-assign]


def attempt(job: Job, *, stop: bool) -> dict[str, Any]:
    trainer = make_trainer(job, torch.device("cpu"))
    if stop:
        stop_in_update(trainer, 2)
    try:
        trainer.train()
    except SystemExit as end:
        assert (stop, end.code) == (True, STOPPED)
    weights = whole_weights(trainer.engine)
    trainer.journal.close()
    del trainer
    gc.collect()
    parallel_state.destroy_model_parallel()
    return weights


def main() -> None:
    logging.getLogger("megatron").setLevel(logging.ERROR)
    METHODS[Linear.name] = Linear()
    jobs = [Job.model_validate(json.loads(Path(p).read_text())) for p in json.loads(Path(sys.argv[1]).read_text())]
    join_ranks(jobs[0].settings.parallel, torch.device("cpu"), jobs[0].settings.timeout_s)
    for job in jobs:
        if job.directory.name == "resumed":
            attempt(job, stop=True)
        weights = attempt(job, stop=False)
        if dist.get_rank() == 0:
            torch.save(weights, job.directory / "weights.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    child_main(main)

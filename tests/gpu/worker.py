"""A rank that trains one job after another: on a GPU most of a short training is the start of its process.

``python -m tests.gpu.worker DEVICE`` reads the paths of job files from its input and answers each with "done".
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_stepkto.base.files import read_json
from megatron_stepkto.base.processes import child_main, die_with_parent
from megatron_stepkto.megatron.acceleration import choose, choose_device, describe, find_machine
from megatron_stepkto.megatron.ranks import join_ranks
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.training.job import Job
from megatron_stepkto.training.rank import make_trainer


def main() -> None:
    logging.getLogger("megatron").setLevel(logging.ERROR)
    die_with_parent()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Megatron-Core 0.19 prints, which would be taken for an answer
    device = choose_device(sys.argv[1])
    join_ranks(recipe.Parallel(), device, 120)
    machine = find_machine(device)
    for line in sys.stdin:
        job = Job.model_validate(read_json(Path(line.strip())))
        acceleration = choose(job.settings, machine)
        trainer = make_trainer(job, device, acceleration)
        trainer.journal.notes["acceleration"] = describe(acceleration, machine)
        trainer.run()
        for number in (signal.SIGTERM, signal.SIGUSR1):  # the trainer's handlers hold it
            signal.signal(number, signal.SIG_DFL)
        del trainer
        parallel_state.destroy_model_parallel()
        if machine.transformer_engine.version is not None:
            from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

            FP8GlobalStateManager.reset()  # the maxima that delayed scaling keeps by the name of a group
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        print("done", file=answers, flush=True)
    dist.destroy_process_group()


if __name__ == "__mp_main__":  # a save starts a process that imports this module again: it must not outlive this one
    die_with_parent()
if __name__ == "__main__":
    child_main(main)

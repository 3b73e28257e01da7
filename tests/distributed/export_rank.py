"""Run by torchrun: trains jobs one after another; each rank leaves its parameters as they are in its memory.

``JOBS`` is a JSON list of job files; the logits of the trained model are written to ``logits.pt`` in each job's folder,
and every rank's parameters to ``rank_N.pt``: names with the number of the layer (and expert) in the whole model.
"""

from __future__ import annotations

import gc
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_stepkto.base.processes import child_main, die_with_parent
from megatron_stepkto.megatron.engine import Engine
from megatron_stepkto.megatron.ranks import join_ranks
from megatron_stepkto.training.job import Job
from megatron_stepkto.training.rank import make_trainer
from tests.distributed.logits_rank import write_logits

_LAYER, _EXPERT = re.compile(r"decoder\.layers\.(\d+)\."), re.compile(r"local_experts\.(\d+)\.")


def own_parameters(engine: Engine) -> dict[str, torch.Tensor]:
    """This rank's parameters by a name that no other stage has."""
    found = {}
    for policy in engine.policies:
        layers = policy.decoder.layers

        def layer(match: re.Match[str], layers: Any = layers) -> str:
            return f"layers.{layers[int(match[1])].layer_number - 1}."

        for name, parameter in policy.named_parameters():
            name = _LAYER.sub(layer, name)
            if match := _EXPERT.search(name):
                held = len(layers[0].mlp.experts.local_experts)
                number = parallel_state.get_expert_model_parallel_rank() * held + int(match[1])
                name = _EXPERT.sub(f"experts.{number}.", name)
            found[name] = parameter.detach().clone()
    return found


def main() -> None:
    logging.getLogger("megatron").setLevel(logging.ERROR)
    listed: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    jobs = [Job.model_validate(json.loads(Path(path).read_text())) for path in listed["jobs"]]
    device = torch.device("cpu")
    join_ranks(jobs[0].settings.parallel, device, jobs[0].settings.timeout_s)
    for job in jobs:
        trainer = make_trainer(job, device)
        trainer.run()
        # The replicas of other ranks hold the same; of those of tensor parallelism each is a part.
        place = {
            "tensor": parallel_state.get_tensor_model_parallel_rank(),
            "expert_tensor": parallel_state.get_expert_tensor_parallel_rank(),
            "weights": own_parameters(trainer.engine),
        }
        torch.save(place, job.directory / f"rank_{dist.get_rank()}.pt")
        write_logits(trainer.engine, job.directory / "logits.pt", listed["texts"])
        dist.barrier()
        del trainer
        gc.collect()
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__mp_main__":
    die_with_parent()
if __name__ == "__main__":
    child_main(main)

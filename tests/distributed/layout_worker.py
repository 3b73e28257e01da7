"""One rank of ``test_layouts``: trains a list of jobs one after another, so that many layouts share one start.

``torchrun -m tests.distributed.layout_worker JOBS`` with JOBS a JSON list of job files of this many ranks. Rank 0
leaves ``result.pt`` in each job's folder: the whole weights, put together from all ranks without a checkpoint.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from megatron_stepkto.base.processes import child_main
from megatron_stepkto.megatron import engine
from megatron_stepkto.megatron.engine import Engine
from megatron_stepkto.megatron.main_weights import optimizer_parts
from megatron_stepkto.megatron.memory import data_parallel_fields
from megatron_stepkto.megatron.ranks import join_ranks
from megatron_stepkto.recipe.keys import Training
from megatron_stepkto.training.job import Job
from megatron_stepkto.training.rank import make_trainer


def whole_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Every weight by its checkpoint key, on rank 0; each element comes from exactly one rank."""
    state = engine.checkpoints.weights()
    apply_factories(state)
    pieces = [
        (value.key, tuple(value.global_shape), tuple(value.global_offset), value.data.detach().cpu())
        for value in nested_values(state)
        if isinstance(value, ShardedTensor) and is_main_replica(value.replica_id)
    ]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, pieces)
    whole: dict[str, torch.Tensor] = {}
    for key, shape, offset, data in (piece for share in gathered for piece in share):
        data = data.reshape((1,) * (len(shape) - data.dim()) + tuple(data.shape))
        target = whole.setdefault(key, torch.full(shape, float("nan")))
        target[tuple(slice(a, a + n) for a, n in zip(offset, data.shape, strict=True))] = data
    return whole


def parameters() -> list[torch.nn.Parameter]:
    """All parameters that live in this process, whoever holds them."""
    return [item for item in gc.get_objects() if type(item) is torch.nn.Parameter]


def in_small_buckets(settings: Training) -> dict[str, Any]:
    """As for a model of billions of weights: gradients are sent in several parts, during the backward pass."""
    return {**data_parallel_fields(settings), "bucket_size": 20_000}


class Arrival:
    """A gather of weights that ends when it is waited for: until then, whoever reads a weight gets nan."""

    def __init__(self, group: Any) -> None:
        group.param_gather_handle.wait()
        self._weights = [bucket.param_data for bucket in group.buckets]
        self._arrived = [weights.clone() for weights in self._weights]
        for weights in self._weights:
            weights.fill_(float("nan"))

    def wait(self) -> None:
        for weights, arrived in zip(self._weights, self._arrived, strict=True):
            weights.copy_(arrived)


def gather_late() -> None:
    """Let gathers beside computation end as late as they may."""
    start = _ParamAndGradBucketGroup.start_param_sync

    def start_param_sync(self: Any, force_sync: bool = False) -> None:
        start(self, force_sync)
        if self.param_gather_handle is not None:
            self.param_gather_handle = Arrival(self)

    _ParamAndGradBucketGroup.start_param_sync = start_param_sync


def optimizer_state(engine: Engine) -> list[torch.Tensor]:
    """This rank's main weights and moments, themselves."""
    return [
        tensor
        for part in optimizer_parts(engine.optimizer)
        for weight, state in part.optimizer.state.items()
        for tensor in (weight.data, state["exp_avg"], state["exp_avg_sq"])
    ]


def restored(engine: Engine, directory: Path) -> int:
    """How many tensors of the optimizer a checkpoint gives back, after they are overwritten: all."""
    engine.checkpoints.save_state(directory)
    before = [tensor.clone() for tensor in optimizer_state(engine)]
    for tensor in optimizer_state(engine):
        tensor.zero_()
    engine.checkpoints.load_state(directory)
    after = optimizer_state(engine)
    assert len(after) == len(before)
    return sum(torch.equal(a, b) and bool(a.any()) for a, b in zip(after, before, strict=True))


def main() -> None:
    gather_late()
    engine.data_parallel_fields = in_small_buckets  # type: ignore[attr-defined]
    logging.getLogger("megatron").setLevel(logging.ERROR)
    jobs = [Job.model_validate(json.loads(Path(p).read_text())) for p in json.loads(Path(sys.argv[1]).read_text())]
    device = torch.device("cpu")
    join_ranks(jobs[0].settings.parallel, device, jobs[0].settings.timeout_s)
    for job in jobs:
        earlier = parameters()  # held, so that no new one gets the address of one of an earlier job's
        known = set(map(id, earlier))
        trainer = make_trainer(job, device)
        if (job.directory / "fused head").exists():  # as beside layers that add to the gradient buffer themselves
            trainer.engine.megatron.gradient_accumulation_fusion = True
        own = sum(p.numel() for policy in trainer.engine.policies for p in policy.parameters())
        resident: list[int] = []
        score = trainer.engine.score

        def counted(*args: Any, score: Any = score, resident: list[int] = resident, known: Any = known) -> Any:
            resident.append(sum(p.numel() for p in parameters() if id(p) not in known))
            return score(*args)

        trainer.engine.score = counted  # type: ignore[method-assign]
        trainer.start_adapters()
        before = whole_weights(trainer.engine) if job.settings.lora else {}
        trainer.train()
        weights = whole_weights(trainer.engine)
        facts = {"parameters": own, "resident": max(resident, default=own)}
        if (job.directory / "restored").exists():
            facts["state"] = len(optimizer_state(trainer.engine))
            facts["restored"] = restored(trainer.engine, job.directory / "state")
        if dist.get_rank() == 0:
            torch.save({"weights": weights, "before": before, **facts}, job.directory / "result.pt")
        del trainer, score, counted, earlier
        gc.collect()
        parallel_state.destroy_model_parallel()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    child_main(main)

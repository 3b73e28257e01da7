"""Devices and process groups, for ranks that torchrun or Slurm started and for a single process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroupGloo, distributed_c10d

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.processes import usable_cores
from megatron_stepkto.megatron import onednn, patches
from megatron_stepkto.recipe import keys as recipe


class _OnOneLoop(ProcessGroupGloo):
    """A Gloo group on the event loop of all groups of this process.

    By default each has a loop of its own, a thread that wakes a hundred times a second. Megatron-Core creates about 40
    groups, so that four waiting ranks take a sixth of a core.
    """

    _devices: ClassVar[list[ProcessGroupGloo.Device]] = []

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        if not self._devices:
            self._devices.append(ProcessGroupGloo.create_default_device())
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices, options._timeout = self._devices, timeout
        super().__init__(store, rank, size, options)


@contextmanager
def _gloo_on_one_loop() -> Iterator[None]:
    distributed_c10d.ProcessGroupGloo = _OnOneLoop  # type: ignore[misc]
    try:
        yield
    finally:
        distributed_c10d.ProcessGroupGloo = ProcessGroupGloo  # type: ignore[misc]


def join_ranks(parallel: recipe.Parallel, device: torch.device, timeout_s: float) -> None:
    """Join the ranks that torchrun (or Slurm) started.

    Raises:
        UserError: the number of processes differs from the recipe's.
    """
    on_cpu = device.type == "cpu"
    if on_cpu:
        patches.install()
        torch.set_num_threads(max(1, usable_cores() // parallel.ranks))
    else:
        patches.install_everywhere()
        torch.cuda.set_device(device)
    with _gloo_on_one_loop():
        dist.init_process_group("gloo" if on_cpu else "nccl", timeout=timedelta(seconds=timeout_s))
    if dist.get_world_size() != parallel.ranks:
        raise UserError(
            f"train.parallel.ranks is {parallel.ranks}, but {dist.get_world_size()} processes were started; "
            "make them equal"
        )
    if on_cpu:
        everywhere = torch.tensor(int(onednn.is_faster()))
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)  # all ranks or none: nodes may differ
        if everywhere.item():
            onednn.use_for_matrix_products()


def lay_out(parallel: recipe.Parallel, timeout_s: float) -> None:
    """Create Megatron-Core's groups for this layout. Every group gets the time limit: its default is 30 minutes."""
    with _gloo_on_one_loop():
        parallel_state.initialize_model_parallel(
            parallel.tensor,
            parallel.pipeline,
            parallel.virtual_pipeline,
            context_parallel_size=parallel.context,
            distributed_timeout_minutes=timeout_s / 60,  # becomes a timedelta, which takes fractions
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
        )
    # No pass is random (no dropout), but Megatron's tracker requires a seed.
    tensor_parallel.model_parallel_cuda_manual_seed(1)


@contextmanager
def one_rank(device: torch.device) -> Iterator[None]:
    """A world of this process alone, for a forward pass without torchrun."""
    if device.type == "cpu":
        patches.install()
    backend = "gloo" if device.type == "cpu" else "nccl"
    dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore(), timeout=timedelta(minutes=10))
    try:
        lay_out(recipe.Parallel.model_validate({}), timeout_s=600)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()

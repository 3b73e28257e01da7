"""Dry run: any rank's true shard of a model, built by ``model.py`` on the meta device, in one process.

torch's fake process group simulates a world of any size without other processes; the meta device gives
shapes without memory. So the parameters and the distributed optimizer's shards of a 70B model at 1,024 ranks
can be counted, not estimated, on a laptop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron_stepkto.architectures.adapters import AdaptedLinear, adapted_linears, adapter_parameters
from megatron_stepkto.architectures.model_config import Entry, ModelConfig
from megatron_stepkto.architectures.sharding import (
    Check,
    Shard,
    data_parallel_size,
    optimizer_shard,
    stage_parameters,
)
from megatron_stepkto.megatron import patches
from megatron_stepkto.recipe.keys import LoRA, Parallel


def global_rank(parallel: Parallel, tensor_rank: int, stage: int, data_rank: int) -> int:
    """Megatron-Core orders ranks tensor first, then data, then pipeline."""
    return (stage * data_parallel_size(parallel) + data_rank) * parallel.tensor + tensor_rank


@contextlib.contextmanager
def fake_rank(parallel: Parallel, rank: int) -> Iterator[None]:
    """Make this process one rank of ``parallel.ranks``; no other exists, and collectives do nothing."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    patches.install()
    assert not dist.is_initialized(), "a dry run needs a process without a process group"
    dist.init_process_group("fake", rank=rank, world_size=parallel.ranks, store=FakeStore())
    try:
        # gloo groups would wait for processes that do not exist
        parallel_state.initialize_model_parallel(
            parallel.tensor,
            parallel.pipeline,
            parallel.virtual_pipeline,
            create_gloo_process_groups=False,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def build_shard(
    config: ModelConfig,
    parallel: Parallel,
    dtype: torch.dtype,
    *,
    tensor_rank: int = 0,
    stage: int = 0,
    data_rank: int = 0,
    optimizer: bool = False,
    lora: LoRA | None = None,
    adapted: Mapping[str, AdaptedLinear] | None = None,
) -> Shard:
    """Build one rank's shard, and count its elements. lora, adapted: see ``build_model_chunks``."""
    from megatron_stepkto.megatron.model import build_model_chunks, transformer_config

    rank = global_rank(parallel, tensor_rank, stage, data_rank)
    with fake_rank(parallel, rank), patches.on_meta_device():
        megatron = transformer_config(config, parallel, dtype, on_cpu=True)
        chunks = build_model_chunks(config, megatron, lora=lora, adapted=adapted)
        assert all(weight.is_meta for chunk in chunks for weight in chunk.parameters())
        counted = tuple(sum(weight.numel() for weight in chunk.parameters()) for chunk in chunks)
        held = _optimizer_elements(megatron, list(chunks), dtype) if optimizer else None
    return Shard(rank, tensor_rank, stage, data_rank, counted, held)


def _optimizer_elements(megatron: Any, chunks: list[Any], dtype: torch.dtype) -> int:
    """Elements of this rank's main parameters in the distributed optimizer, built as in ``Engine`` without overlap.

    (Overlap cuts a buffer into buckets, each padded by itself: a rank may hold up to 128 elements a bucket more.)
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_stepkto.megatron.main_weights import optimizer_parts

    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    model = [
        DistributedDataParallel(megatron, ddp, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(chunks)
    ]
    settings = OptimizerConfig(
        optimizer="adam", lr=1e-6, bf16=dtype == torch.bfloat16, params_dtype=dtype, use_distributed_optimizer=True
    )
    made: Any = get_megatron_optimizer(settings, model, use_gloo_process_groups=False)
    return sum(
        weight.numel()
        for part in optimizer_parts(made)
        for group in part.optimizer.param_groups
        for weight in group["params"]
    )


def check_plan(
    config: ModelConfig, entries: list[Entry], parallel: Parallel, dtype: torch.dtype, lora: LoRA | None = None
) -> list[Check]:
    """Build the first and last tensor rank of every pipeline stage and compare with the plan, element by element."""
    checks = []
    adapted = adapted_linears(entries, lora.targets) if lora else None
    for stage in range(parallel.pipeline):
        planned = trained = stage_parameters(config, entries, parallel, stage)
        if lora:
            trained = adapter_parameters(config, entries, lora, parallel, stage)
        held = tuple(map(sum, zip(planned.chunks, trained.chunks, strict=True))) if lora else planned.chunks
        for tensor_rank in sorted({0, parallel.tensor - 1}):
            shard = build_shard(
                config,
                parallel,
                dtype,
                tensor_rank=tensor_rank,
                stage=stage,
                optimizer=parallel.distributed_optimizer,
                lora=lora,
                adapted=adapted,
            )
            largest = optimizer_shard(trained, parallel) if parallel.distributed_optimizer else None
            checks.append(Check(shard, held, largest))
    return checks

"""What one rank of each pipeline stage holds, in bytes: exact for weights, gradients and optimizer, then estimates."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from megatron_stepkto.architectures.adapters import adapter_parameters, low_rank_width
from megatron_stepkto.architectures.model_config import Entry, ModelConfig
from megatron_stepkto.architectures.sharding import (
    StageParameters,
    data_parallel_size,
    optimizer_shard,
    padded_vocab_size,
    stage_parameters,
)
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.logprobs import tokens_at_a_time
from megatron_stepkto.planning.activations import (
    CPU,
    CUDA,
    Kernels,
    Layout,
    head_saved_bytes,
    layers_in_flight,
    saved_per_layer,
    widest,
    working_bytes,
)
from megatron_stepkto.recipe.keys import Parallel, Training

# CUDA context, cuBLAS workspaces and NCCL's buffers of a handful of groups.
OVERHEAD_BYTES = 3.0e9
# The caching allocator does not fill its blocks completely.
FRAGMENTATION = 0.05
# Of an element whose AdamW runs on the host, float32: main weight, two moments, gradient.
HOST_BYTES = 16
# Layers whose activations are copied to the host or back while another computes.
OFFLOADED_AT_ONCE = 2


@dataclass(frozen=True)
class StageMemory:
    """One rank of a stage. Activations with head, KL pass and step do not coexist: ``peak`` takes the largest.

    weights, gradients, optimizer (main weights where training is bf16, both moments; without the part that the host
    holds): exact. activations: of all micro-batches in flight and of one layer's backward. head: chunk of logits and
    the gradient of the head's weight (last stage). kl_pass: forward without gradient. step: AdamW's temporaries.
    host: of the host's memory: offloaded optimizer state with its gradients, and activations.
    """

    stage: int
    parameters: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    kl_pass: float
    step: float
    overhead: float
    host: float = 0.0

    @property
    def state(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        dynamic = max(self.activations + self.head, self.kl_pass, self.step)
        return self.state + dynamic * (1 + FRAGMENTATION) + self.overhead


def state_bytes(config: ModelConfig, entries: list[Entry], settings: Training, stage: int) -> tuple[int, int, int]:
    """(weights, gradients, optimizer) of a rank, as ``Engine`` allocates them, without what the host holds. Frozen
    weights are weights alone."""
    held, trained = held_and_trained(config, entries, settings, stage)
    shard = shard_elements(trained, settings.parallel)
    if settings.dtype == "float32":
        return 4 * held, 4 * trained.total, 8 * shard  # the weights are their own main weights
    optimizer = settings.optimizer
    gradients = 2 if optimizer.gradient_dtype == "bfloat16" else 4
    # a main weight and two moments: in float32, or 16 bits beside those of the weight and moments of 16 bits
    per_element = 6 if optimizer.moment_dtype == "bfloat16" else 12
    return 2 * held, gradients * trained.total, round(per_element * shard * (1 - optimizer.offload))


def shard_elements(trained: StageParameters, parallel: Parallel) -> int:
    """Trained elements whose optimizer state is this rank's, the largest share of the data-parallel ranks'."""
    return optimizer_shard(trained, parallel) if parallel.distributed_optimizer else trained.total


def held_and_trained(
    config: ModelConfig, entries: list[Entry], settings: Training, stage: int
) -> tuple[int, StageParameters]:
    """Elements of all weights on a rank, and those that train: all of them, or adapters."""
    held = stage_parameters(config, entries, settings.parallel, stage)
    if settings.lora is None:
        return held.total, held
    adapters = adapter_parameters(config, entries, settings.lora, settings.parallel, stage)
    return held.total + adapters.total, adapters


def layout_of(config: ModelConfig, entries: list[Entry], settings: Training, kernels: Kernels = CUDA) -> Layout:
    parallel = settings.parallel
    return Layout(
        parallel.tensor,
        parallel.sequence,
        2 if settings.dtype == "bfloat16" else 4,
        settings.recompute,
        kernels,
        low_rank_width(config, entries, settings.lora, parallel) if settings.lora else 0.0,
        config.num_layers // (parallel.pipeline * (parallel.virtual_pipeline or 1)),
        parallel.expert_tensor,
    )


def stage_memory(
    config: ModelConfig,
    entries: list[Entry],
    settings: Training,
    stage: int,
    *,
    num_micro_batches: int,
    response_share: float = 1.0,
    on_gpu: bool = True,
) -> StageMemory:
    """Memory of a rank of pipeline stage ``stage`` at the fullest micro-batch (``micro_batch_tokens``).

    response_share: tokens of responses among all; only these reach the head.
    """
    parallel, tokens = settings.parallel, settings.micro_batch_tokens // settings.parallel.context
    layout = layout_of(config, entries, settings, CUDA if on_gpu else CPU)
    num_bytes = layout.num_bytes
    weights, gradients, optimizer = state_bytes(config, entries, settings, stage)
    held, trained = held_and_trained(config, entries, settings, stage)
    shard = shard_elements(trained, parallel)
    in_flight = layers_in_flight(config, parallel, stage, num_micro_batches)
    per_layer = tokens * saved_per_layer(config, layout)
    # of the layers whose activations wait on the host, two are on their way there or back
    away = max(0, settings.offload_layers - OFFLOADED_AT_ONCE)
    activations = (in_flight - away) * per_layer + tokens * working_bytes(config, layout)
    per_stage = config.num_layers // parallel.pipeline
    if parallel.pipeline > 1:  # the output of each micro-batch waits for its gradient
        hidden = config.hidden_size / layout.hidden_share * num_bytes
        activations += tokens * hidden * in_flight / per_stage * (parallel.virtual_pipeline or 1)
    forward_only = tokens * (3 * widest(config) / parallel.tensor + 3 * config.hidden_size) * num_bytes
    head = 0.0
    if stage == parallel.pipeline - 1:
        per_token, per_row = head_saved_bytes(config, layout)
        activations += tokens * (per_token + response_share * per_row)
        rows = padded_vocab_size(config.vocab_size, parallel.tensor) // parallel.tensor
        # backward of a chunk: float32 logits and their copy in the compute dtype; the weight's gradient adds up in
        # float32, beside one chunk's product and its float32 copy, and is returned in the compute dtype
        chunk = min(tokens, tokens_at_a_time(rows))
        head = chunk * rows * (4 + num_bytes)
        if settings.lora is None:  # a frozen head has no gradient
            head += rows * config.hidden_size * (4 + 2 * num_bytes + 4)
        forward_only += chunk * rows * 4 + tokens * config.hidden_size * num_bytes
    step = 4 * shard * (1 - settings.optimizer.offload)  # torch's AdamW takes the root of all second moments at once
    precise = settings.optimizer.offload or settings.optimizer.moment_dtype == "bfloat16"
    if settings.optimizer.gradient_dtype == "bfloat16" and not precise:
        step += 4 * shard  # AdamW reads a float32 copy of the gradients
    return StageMemory(
        stage=stage,
        parameters=held,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        head=head,
        kl_pass=forward_only,
        step=step if on_gpu else 0.0,
        overhead=OVERHEAD_BYTES if on_gpu else 0.0,
        host=HOST_BYTES * shard * settings.optimizer.offload + settings.offload_layers * per_layer,
    )


def rank_capacity(device: torch.device, ranks: int | None = None) -> tuple[float, str]:
    """Bytes that a rank may use, and what they belong to: its GPU, or its share of the host's memory.

    Args:
        ranks: number that share this host; None: from ``LOCAL_WORLD_SIZE``.
    """
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory), "its GPU"
    ranks = ranks or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return psutil.virtual_memory().total / ranks, f"its share (1 of {ranks}) of the host's memory"


def check_state_fits(
    config: ModelConfig,
    entries: list[Entry],
    settings: Training,
    capacity: float,
    where: str,
    place: Callable[[str], str] | None = None,
) -> None:
    """Refuse a layout whose weights, gradients and optimizer alone exceed a rank's memory: it cannot start.

    Args:
        capacity: bytes that a rank may use. where: what the memory belongs to, for the message.

    Raises:
        UserError: names the fullest stage and the keys to change.
    """
    sizes = {s: sum(state_bytes(config, entries, settings, s)) for s in range(settings.parallel.pipeline)}
    stage = max(sizes, key=lambda s: sizes[s])
    if sizes[stage] <= capacity:
        return
    prefix = f"{place('train.parallel')}: " if place else ""
    raise UserError(
        f"{prefix}weights, gradients and optimizer of a rank of pipeline stage {stage} take "
        f"{sizes[stage] / 1e9:.1f} GB, {where} has {capacity / 1e9:.1f} GB; {advice(settings.parallel)} "
        "(`stepkto plan` proposes layouts)"
    )


def advice(parallel: Parallel) -> str:
    """Which keys lower a rank's memory."""
    keys = ["raise train.parallel.tensor or train.parallel.pipeline (with train.parallel.ranks)"]
    if not parallel.distributed_optimizer and data_parallel_size(parallel) > 1:
        keys.append("set train.parallel.distributed_optimizer: true")
    return ", or ".join(keys)

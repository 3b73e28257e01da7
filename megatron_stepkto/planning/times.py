"""Rough times of an update and an iteration: arithmetic at a stated share of the peak, plus what is not overlapped.

Nothing here was measured on a GPU. The model: a stage's arithmetic runs at ``mfu`` of the peak; tensor-, expert- and
pipeline-parallel messages are added to it (none is taken to overlap); a pipeline adds its bubble; the data-parallel
reduction and the optimizer come once per update. What is computed again costs its forward FLOPs and messages; what lies
on the host costs its bytes over PCIe, both ways, and an offloaded AdamW its bytes of the host's memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_stepkto.architectures.flops import forward_flops, layer_flops
from megatron_stepkto.architectures.model_config import Entry, ModelConfig
from megatron_stepkto.architectures.sharding import data_parallel_size, model_parameters
from megatron_stepkto.planning.activations import saved_per_layer
from megatron_stepkto.planning.cluster import Cluster
from megatron_stepkto.planning.memory import held_and_trained, layout_of, shard_elements, state_bytes
from megatron_stepkto.recipe.keys import Recompute, Training

# AdamW on the host, float32: reads gradient, weight and two moments, writes the latter three.
HOST_ADAM_BYTES = 28
ENGINE_SHARE = 0.9  # of a GPU's memory that an engine of vLLM takes: weights, and the rest for its cache


@dataclass(frozen=True)
class Assumptions:
    """Stated, not measured.

    mfu: share of the bf16 peak that arithmetic alone reaches. link: share of a link's data-sheet bandwidth that
    collectives reach. fill: share of a packed micro-batch that is not padding or room left over. sampling_mfu,
    sampling_hbm: shares that decoding reaches of the arithmetic peak and of the memory bandwidth. sequences: the
    most solutions that one engine decodes concurrently, where its cache holds them. pcie, host: shares that offload
    reaches of the data-sheet bandwidths of PCIe and of the host's memory.
    """

    mfu: float = 0.40
    link: float = 0.70
    fill: float = 0.92
    sampling_mfu: float = 0.30
    sampling_hbm: float = 0.50
    sequences: int = 256
    pcie: float = 0.70
    host: float = 0.50


@dataclass(frozen=True)
class Workload:
    """One iteration. Tokens are means per document (prompt and response); kl_share: KL pairs per example, 0 for none.

    uses_reference: whether the method takes log-ratios to a reference. samples: solutions sampled.
    """

    examples: int
    global_batch: int
    epochs: int
    tokens: int
    response_tokens: int
    kl_share: float
    uses_reference: bool
    samples: int

    @property
    def updates(self) -> int:
        return max(1, math.ceil(self.examples / self.global_batch)) * self.epochs

    @property
    def response_share(self) -> float:
        return self.response_tokens / self.tokens


@dataclass(frozen=True)
class Scenario:
    """What a plan is made for: a model, a cluster, an iteration's work."""

    config: ModelConfig
    entries: list[Entry]
    cluster: Cluster
    work: Workload
    assumed: Assumptions


@dataclass(frozen=True)
class Times:
    """Seconds. update: of one update with its KL pass; its parts follow. compute is without what is computed again
    (recompute). offload: of optimizer and activations. mfu: model FLOPs of the update proper (no recomputation, no KL
    pass) over the peak of all GPUs in that time."""

    update: float
    compute: float
    recompute: float
    tensor_parallel: float
    expert_parallel: float
    pipeline_messages: float
    bubble: float
    data_parallel: float
    optimizer: float
    offload: float
    kl_pass: float
    reference_pass: float
    sampling: float
    iteration: float
    mfu: float
    micro_batches: int


@dataclass(frozen=True)
class _Pass:
    """Seconds of one micro-batch on the slowest stage, by part."""

    compute: float
    recompute: float
    tensor_parallel: float
    expert_parallel: float
    pipeline_messages: float

    @property
    def total(self) -> float:
        parts = (self.compute, self.recompute, self.tensor_parallel, self.expert_parallel, self.pipeline_messages)
        return sum(parts)


@dataclass(frozen=True)
class _Again:
    """Shares of a mean layer's forward pass that the backward pass repeats: of its arithmetic, of its tensor-parallel
    and of its expert-parallel messages."""

    arithmetic: float = 0.0
    tensor: float = 0.0
    expert: float = 0.0


def _repeated(case: Scenario, settings: Training) -> _Again:
    recompute, parallel = settings.recompute, settings.parallel
    if not isinstance(recompute, Recompute):
        return _Again(*[float(recompute)] * 3)
    if recompute.every:
        return _Again(1, 1, 1)
    if recompute.layers:
        held = case.config.num_layers / (parallel.pipeline * (parallel.virtual_pipeline or 1))
        return _Again(*[recompute.layers / held] * 3)
    flops = layer_flops(case.config, case.work.tokens)
    # norms have no product to repeat: their share is taken for 0
    part_of = {"core_attn": "attention", "mlp": "mlp", "moe": "mlp"}
    modules = recompute.modules or []
    arithmetic = sum(flops[part_of[module]] for module in modules if module in part_of) / sum(flops.values())
    # one of a dense layer's two all-reduces is the MLP's
    return _Again(arithmetic, 0.5 * ("mlp" in modules), float("moe" in modules))


def _pass(case: Scenario, settings: Training, tokens: float, *, train: bool) -> _Pass:
    """A micro-batch of ``tokens``: a forward pass, or with ``train`` a backward pass and what it computes again too.

    A backward pass is worth two forward passes, of frozen weights one (the adapters' own products are not counted). The
    head computes its logits again in it.
    """
    config, cluster, assumed = case.config, case.cluster, case.assumed
    parallel = settings.parallel
    layer, head = forward_flops(config, tokens, tokens * case.work.response_share, case.work.tokens)
    layers = config.num_layers / parallel.pipeline
    speed = cluster.bf16_tflops * 1e12 * assumed.mfu * parallel.tensor
    backward = (2 - (settings.lora is not None)) if train else 0
    compute = (layers * layer * (1 + backward) + head * (1 + backward + train)) / speed
    again = _repeated(case, settings) if train else _Again()

    hidden = tokens * config.hidden_size * (2 if settings.dtype == "bfloat16" else 4)
    # two all-reduces (or their halves, under sequence parallelism) per layer and direction
    directions = 2 if train else 1
    moved = 2 * (parallel.tensor - 1) / parallel.tensor * hidden
    # experts are not split with attention: only that sends, and each tensor rank sends its own tokens to the experts
    per_direction = 1 if config.experts else 2
    tensor_time = layers * per_direction * (directions + again.tensor) * moved / _rate(case, parallel.tensor)
    expert_time = 0.0
    if config.experts:  # there and back, each token to its top-k experts; to all ranks that share an expert
        routed = hidden / parallel.tensor * config.experts.per_token
        sent = routed * (parallel.expert - 1) / parallel.expert
        shared = routed * (parallel.expert_tensor - 1)
        span = parallel.expert * parallel.expert_tensor
        expert_time = layers * 2 * (directions + again.expert) * (sent + shared) / _rate(case, span)
    messages = 0.0
    if parallel.pipeline > 1:
        span = parallel.ranks // parallel.pipeline + 1
        sent = hidden / (parallel.tensor if parallel.sequence else 1) * (parallel.virtual_pipeline or 1)
        messages = sent * directions / _rate(case, span)
    return _Pass(compute, layers * layer * again.arithmetic / speed, tensor_time, expert_time, messages)


def _rate(case: Scenario, span: int) -> float:
    """Bytes per second of a link in a group that spans ``span`` consecutive ranks."""
    return case.cluster.link_gbs(span) * 1e9 * case.assumed.link


def micro_batches(case: Scenario, settings: Training, tokens: float) -> tuple[int, float]:
    """(number, tokens of one) for a replica's share of ``tokens``; interleaved pipelines round up to their stages."""
    parallel = settings.parallel
    # a replica has at least one document
    per_replica = max(tokens / data_parallel_size(parallel), case.work.tokens)
    count = math.ceil(per_replica / (settings.micro_batch_tokens / parallel.context * case.assumed.fill))
    multiple = parallel.pipeline if parallel.virtual_pipeline else 1
    count = -(-count // multiple) * multiple
    return count, per_replica / count


def micro_batch_tokens(case: Scenario, settings: Training) -> float:
    """Tokens of one micro-batch of an update."""
    return micro_batches(case, settings, case.work.global_batch * case.work.tokens)[1]


def estimate_times(case: Scenario, settings: Training) -> Times:
    config, work, parallel = case.config, case.work, settings.parallel
    bubble_passes = (parallel.pipeline - 1) / (parallel.virtual_pipeline or 1)
    batch_tokens = work.global_batch * work.tokens
    count, tokens = micro_batches(case, settings, batch_tokens)
    train = _pass(case, settings, tokens, train=True)

    def forward_only(total: float) -> float:
        if not total:
            return 0.0
        number, size = micro_batches(case, settings, total)
        return (number + bubble_passes) * _pass(case, settings, size, train=False).total

    reduction, step = _once_per_update(case, settings)
    offload = offloaded(case, settings, count, tokens).seconds
    kl_pass = forward_only(batch_tokens * work.kl_share)
    bubble = bubble_passes * train.total
    proper = count * train.total + bubble + reduction + step + offload
    layer, head = forward_flops(config, batch_tokens, batch_tokens * work.response_share, work.tokens)
    model_flops = (2 if settings.lora else 3) * (config.num_layers * layer + head)
    reference = forward_only(work.examples * work.tokens * (1 + work.kl_share)) if work.uses_reference else 0.0
    sampling = sampling_seconds(case)
    return Times(
        update=proper + kl_pass,
        compute=count * train.compute,
        recompute=count * train.recompute,
        tensor_parallel=count * train.tensor_parallel,
        expert_parallel=count * train.expert_parallel,
        pipeline_messages=count * train.pipeline_messages,
        bubble=bubble,
        data_parallel=reduction,
        optimizer=step,
        offload=offload,
        kl_pass=kl_pass,
        reference_pass=reference,
        sampling=sampling,
        iteration=work.updates * (proper + kl_pass) + reference + sampling,
        mfu=model_flops / (proper * parallel.ranks * case.cluster.bf16_tflops * 1e12),
        micro_batches=count,
    )


def _once_per_update(case: Scenario, settings: Training) -> tuple[float, float]:
    """(data-parallel reduction, optimizer) of the fullest stage."""
    parallel = settings.parallel
    replicas = data_parallel_size(parallel)
    held = [state_bytes(case.config, case.entries, settings, stage) for stage in range(parallel.pipeline)]
    _, gradients, optimizer = (max(sizes) for sizes in zip(*held, strict=True))
    per_gradient = 2 if settings.optimizer.gradient_dtype == "bfloat16" else 4
    weights = gradients / per_gradient * (2 if settings.dtype == "bfloat16" else 4)  # those that train
    share = (replicas - 1) / replicas
    # float32 gradients: reduce-scatter and, for the new weights, all-gather; or one all-reduce
    moved = gradients + weights if parallel.distributed_optimizer else 2 * gradients
    # AdamW reads and writes its state, and reads the gradient's part
    traffic = 2 * optimizer + gradients / (replicas if parallel.distributed_optimizer else 1)
    return share * moved / _rate(case, parallel.tensor * replicas), traffic / (case.cluster.hbm_gbs * 1e9)


@dataclass(frozen=True)
class Offloaded:
    """What an update moves between a GPU and its host, in bytes, and what AdamW there reads and writes."""

    pcie: float
    host: float
    seconds: float


def offloaded(case: Scenario, settings: Training, num_micro_batches: int, tokens: float) -> Offloaded:
    """Of the fullest stage. tokens: of a micro-batch. Gradients go to the host and weights come back, once an update;
    activations there and back, every micro-batch."""
    optimizer, cluster, assumed = settings.optimizer, case.cluster, case.assumed
    shard = 0
    if optimizer.offload:
        stages = range(settings.parallel.pipeline)
        trained = (held_and_trained(case.config, case.entries, settings, stage)[1] for stage in stages)
        shard = max(shard_elements(each, settings.parallel) for each in trained)
    elements = optimizer.offload * shard
    pcie = elements * ((2 if optimizer.gradient_dtype == "bfloat16" else 4) + 2)
    if settings.offload_layers:
        per_token = saved_per_layer(case.config, layout_of(case.config, case.entries, settings))
        pcie += 2 * num_micro_batches * tokens * settings.offload_layers * per_token
    host = HOST_ADAM_BYTES * elements
    seconds = pcie / (cluster.pcie_gbs * 1e9 * assumed.pcie) + host / (cluster.host_gbs * 1e9 * assumed.host)
    return Offloaded(pcie, host, seconds)


def sampling_seconds(case: Scenario) -> float:
    """Time to sample the iteration's solutions on the same GPUs."""
    work = case.work
    if not work.samples:
        return 0.0
    rate = decoding_rate(case.config, 2.0 * model_parameters(case.entries), case.cluster.gpus, work.tokens, case)
    return work.samples * work.response_tokens / rate


def engine_gpus(weights: float, gpus: int, cluster: Cluster) -> int:
    """The fewest GPUs (a power of two, in one node) whose half memory holds ``weights`` bytes; at most ``gpus``."""
    number = 1
    while weights / number > 0.5 * cluster.memory_gb * 1e9 and 2 * number <= min(gpus, cluster.gpus_per_node):
        number *= 2
    return number


def cache_bytes(config: ModelConfig, length: float) -> float:
    """Keys and values of a sequence in bfloat16."""
    return 4.0 * config.num_layers * config.num_kv_heads * config.head_dim * length


def decoding_rate(config: ModelConfig, weights: float, gpus: int, length: float, case: Scenario) -> float:
    """Tokens per second that engines on ``gpus`` GPUs generate. A decoding step reads the weights and the keys and
    values of all sequences.

    Args:
        config, weights: the model that generates, and its bytes. length: tokens of a sequence.
        case: for its cluster and assumptions.
    """
    cluster, assumed = case.cluster, case.assumed
    per_engine = engine_gpus(weights, gpus, cluster)
    cache = cache_bytes(config, length)
    room = ENGINE_SHARE * cluster.memory_gb * 1e9 * per_engine - weights
    sequences = max(1.0, min(assumed.sequences, room // cache))
    read = (weights + cache * sequences) / (cluster.hbm_gbs * 1e9 * assumed.sampling_hbm * per_engine)
    compute = weights * sequences / (cluster.bf16_tflops * 1e12 * assumed.sampling_mfu * per_engine)
    return max(1, gpus // per_engine) * sequences / max(read, compute)

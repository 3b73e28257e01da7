"""Megatron-Core behind a few operations: start, score, update (state.py: load, save). One instance per process."""

from __future__ import annotations

import contextlib
import functools
import math
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_stepkto.architectures.adapters import AdaptedLinear
from megatron_stepkto.architectures.flops import forward_flops
from megatron_stepkto.architectures.model_config import ModelConfig
from megatron_stepkto.megatron.acceleration import PLAIN, Acceleration
from megatron_stepkto.megatron.batch import Document, MicroBatch, Slot
from megatron_stepkto.megatron.context_parallel import join, own_part
from megatron_stepkto.megatron.expert_load import ExpertLoad
from megatron_stepkto.megatron.lora import Factors, adapters_of
from megatron_stepkto.megatron.main_weights import optimizer_parts
from megatron_stepkto.megatron.memory import check_norms, data_parallel_fields, optimizer_fields
from megatron_stepkto.megatron.model import build_model_chunks, transformer_config
from megatron_stepkto.megatron.state import Checkpoints
from megatron_stepkto.recipe import keys as recipe

CALIBRATION_PASSES = 3

T = TypeVar("T")
LossOf = Callable[[MicroBatch, Tensor], tuple[Tensor, int, dict[str, Tensor]]]


class Engine:
    """This rank's part of the model in the layout, with its optimizer and its ``checkpoints``.

    Args:
        train: False for passes without gradient: no optimizer.
        adapted: with ``settings.lora``: the layers that have adapters.
    """

    def __init__(
        self,
        config: ModelConfig,
        settings: recipe.Training,
        device: torch.device,
        acceleration: Acceleration = PLAIN,
        *,
        train: bool = True,
        adapted: Mapping[str, AdaptedLinear] | None = None,
    ) -> None:
        self.config, self.settings, self.device, self.acceleration = config, settings, device, acceleration
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
        self.adapted = adapted or {}
        parallel = settings.parallel
        check_norms(config, settings, acceleration)
        self.megatron = transformer_config(
            config,
            parallel,
            self.dtype,
            acceleration,
            on_cpu=device.type == "cpu",
            recompute=settings.recompute,
            offload_layers=settings.offload_layers,
        )
        self.policies = build_model_chunks(config, self.megatron, acceleration, settings.lora, adapted)
        for policy in self.policies:
            policy.to(device)
        modules: list[Any] = list(self.policies)
        if self.dtype == torch.bfloat16:
            modules = [Float16Module(self.megatron, module) for module in modules]
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=parallel.distributed_optimizer,
            **acceleration.data_parallel_fields(),
            **data_parallel_fields(settings),
        )
        self.model = [
            DistributedDataParallel(self.megatron, ddp, module, disable_bucketing=index > 0)
            for index, module in enumerate(modules)
        ]
        self.expert_load = (
            ExpertLoad(config.num_layers, config.experts.number, self.policies, device) if config.experts else None
        )
        self.optimizer: Any = None
        self.megatron.finalize_model_grads_func = finalize_model_grads
        self._arriving = False  # whether weights are being gathered since the last update
        if ddp.overlap_param_gather:
            for chunk in self.model:
                chunk.disable_forward_pre_hook(param_sync=False)  # see _run
        if ddp.overlap_grad_reduce:
            # Gradients of a bucket are sent when they are whole: in the last micro-batch's backward pass.
            waits = [chunk.no_sync for chunk in self.model]
            self.megatron.no_sync_func = waits if len(waits) > 1 else waits[0]
        if train:
            self._make_optimizer()
        self.checkpoints = Checkpoints(
            self.policies, self.model, self.optimizer, self.dtype, acceleration, self.await_weights
        )
        self.forward_backward = get_forward_backward_func()

    def _make_optimizer(self) -> None:
        o = self.settings.optimizer
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=o.lr,
                weight_decay=o.weight_decay,
                adam_beta1=o.beta1,
                adam_beta2=o.beta2,
                adam_eps=o.eps,
                clip_grad=o.clip_grad,
                bf16=self.dtype == torch.bfloat16,
                params_dtype=self.dtype,
                use_distributed_optimizer=self.settings.parallel.distributed_optimizer,
                **self.acceleration.optimizer_fields(),
                **optimizer_fields(self.settings),
            ),
            self.model,
        )
        self.megatron.grad_scale_func = self.optimizer.scale_loss

    # --- adapters ------------------------------------------------------------------------------------------

    def set_adapters(self, factors: Factors) -> None:
        """Set the adapters' values; Megatron's main weights follow."""
        self.await_weights()
        for adapter in adapters_of(self.policies):
            adapter.fill(factors)
        if self.optimizer is not None:
            self.optimizer.reload_model_params()

    @contextlib.contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Within the block the model is its base."""
        adapters = list(adapters_of(self.policies))
        for adapter in adapters:
            adapter.enabled = False
        try:
            yield
        finally:
            for adapter in adapters:
                adapter.enabled = True

    # --- place in the layout -------------------------------------------------------------------------------

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head (of the last virtual chunk)."""
        return bool(parallel_state.is_pipeline_last_stage(ignore_virtual=True))

    @property
    def counts_once(self) -> bool:
        """True on one rank of each data-parallel replica: the one whose sums go into a pooled number."""
        return (
            self.is_last_stage
            and parallel_state.get_tensor_model_parallel_rank() == 0
            and parallel_state.get_context_parallel_rank() == 0
        )

    def slot(self) -> Slot:
        parallel = self.settings.parallel
        # Every rank's tokens: split over the context, and over the tensor-parallel ranks, then a multiple for FP8.
        share = parallel.context * (parallel.tensor if parallel.sequence else 1) * self.acceleration.token_multiple
        return Slot(
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            self.settings.micro_batch_tokens,
            multiple=math.lcm(self.settings.document_multiple, share),
            bins_multiple=parallel.pipeline if parallel.virtual_pipeline else 1,
            document_multiple=self.settings.document_multiple,
            device=self.device,
        )

    def pool(self, sums: dict[str, float]) -> dict[str, float]:
        """Sum of each value over the data-parallel replicas; every rank of every stage gets it."""
        names = sorted(sums)
        values = [sums[name] if self.counts_once else 0.0 for name in names]
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return dict(zip(names, tensor.tolist(), strict=True))

    def peak_memory(self) -> float:
        """Bytes at the peak of this rank so far: on the GPU, or resident in the process."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0

    def update_flops(self, document: Document) -> float:
        """Model FLOPs of training on one document: three forward passes' (the backward pass costs two).

        Matrix products of the layers at every token and of the head at response tokens, causal attention at half
        the pairs. Recomputed activations, the KL pass and padding are not counted: they are overhead. With adapters
        the backward pass costs one: frozen weights have no gradient (the adapters' own products are not counted).
        """
        size, response = len(document), len(document.response)
        layer, head = forward_flops(self.config, size, response, size)
        passes = 2 if self.settings.lora else 3
        return passes * (self.config.num_layers * layer + head)

    # --- passes --------------------------------------------------------------------------------------------

    def _run(self, batches: Sequence[MicroBatch], loss_of: Callable[..., Any], *, forward_only: bool) -> list[Any]:
        # Megatron's mixed-precision wrapper would hand the head float32 hidden states: twice the memory, and another
        # dtype than the head's weight. The head itself computes in float32.
        extra = {"fp32_output": False} if self.dtype == torch.bfloat16 else {}

        def forward_step(batches_left: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(batches_left)
            own, mine = self._own_part(batch)
            with self._counting_experts(batch) if not forward_only else contextlib.nullcontext():
                hidden = model(own.tokens, own.position_ids, None, packed_seq_params=own.packed, **extra)
            return hidden, functools.partial(loss_of, batch, own, mine)

        iterators = [iter(batches) for _ in self.model]
        with self._weights_arriving():
            results: list[Any] = self.forward_backward(
                forward_step_func=forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.model,
                num_microbatches=len(batches),
                seq_length=self.settings.micro_batch_tokens,  # not used: shapes are sent along (variable_seq_lengths)
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            )
        return results

    def _gather_weights(self) -> None:
        """Begin to gather updated weights from the data-parallel ranks that hold them; every rank, in one order."""
        for chunk in self.model:
            # Buckets hold weights from the last layer to the first, which is used first.
            for group in (*reversed(chunk.bucket_groups), *reversed(chunk.expert_parallel_bucket_groups)):
                group.start_param_sync()
        self._arriving = True

    @contextlib.contextmanager
    def _weights_arriving(self) -> Iterator[None]:
        """A pass beside the gathering of weights: every module waits for its own before it runs.

        Megatron's modules would also begin to gather by themselves. A rank without micro-batches would not, and the
        others would wait for it: so they watch only while weights arrive.
        """
        if not self._arriving:
            yield
            return
        for chunk in self.model:
            chunk.enable_forward_pre_hook()
        try:
            yield
        finally:
            for chunk in self.model:
                chunk.disable_forward_pre_hook(param_sync=False)
            self.await_weights()

    def await_weights(self) -> None:
        """Wait until all updated weights are here; for whoever reads them without running their module."""
        if self._arriving:
            for chunk in self.model:
                for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                    if group.param_gather_handle is not None:  # no module has waited for it
                        group.start_param_sync(force_sync=True)  # which waits for one that has begun
            self._arriving = False

    def _counting_experts(self, batch: MicroBatch) -> contextlib.AbstractContextManager[None]:
        if self.expert_load is None:
            return contextlib.nullcontext()
        return self.expert_load.counting(batch, sequence=self.settings.parallel.sequence)

    def _own_part(self, batch: MicroBatch) -> tuple[MicroBatch, Tensor | None]:
        """This rank's part of a micro-batch under context parallelism; else all of it."""
        ranks = self.settings.parallel.context
        return own_part(batch, parallel_state.get_context_parallel_rank(), ranks) if ranks > 1 else (batch, None)

    def _token_log_probs(
        self, batch: MicroBatch, own: MicroBatch, mine: Tensor | None, hidden: Tensor, *, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """[R] log-probs of the whole micro-batch's response tokens, and on request the entropies there."""
        self.await_weights()  # the head's weight is not read by a module of its own
        found = self.policies[-1].log_probs(hidden, own.rows, own.targets, entropy=entropy)
        if mine is None:
            return found
        group = parallel_state.get_context_parallel_group()
        log_probs, entropies = (x if x is None else join(x, mine, batch.targets.numel(), group) for x in found)
        assert log_probs is not None
        return log_probs, entropies

    def score(self, batches: Sequence[MicroBatch], what: Callable[[MicroBatch, Tensor], T]) -> list[T]:
        """One pass without gradient: ``what(batch, token_log_probs)`` per micro-batch, on the last stage only."""

        def collect(
            batch: MicroBatch, own: MicroBatch, mine: Tensor | None, hidden: Tensor, non_loss_data: bool = True
        ) -> T:
            return what(batch, self._token_log_probs(batch, own, mine, hidden)[0])

        for chunk in self.model:
            chunk.eval()
        with torch.no_grad():
            return self._run(batches, collect, forward_only=True) if batches else []

    @contextlib.contextmanager
    def layer_by_layer(self, done: Callable[[float], None]) -> Iterator[None]:
        """Within the block ``done`` is called after each layer of a pass with the micro-batches done on this rank.

        A micro-batch in progress counts by its layers. On a GPU this is what was launched, ahead of what is done.
        """
        layers = [layer for policy in self.policies for layer in policy.decoder.layers]
        passed = 0

        def count(*_: Any) -> None:
            nonlocal passed
            passed += 1
            done(passed / len(layers))

        handles = [layer.register_forward_hook(count) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def calibrate(self, batches: Sequence[MicroBatch]) -> None:
        """Give delayed FP8 scaling its first history: it scales by the largest values of earlier passes.

        It begins with a scale of 1, under which a weight of 0.02 keeps about two bits, and records only passes with
        gradients: without this, reference log-probs would be computed with other scales than training's.
        """
        if not self.acceleration.rounds_by_history:
            return
        for chunk in self.model:
            chunk.eval()
        for _ in range(CALIBRATION_PASSES):  # a layer's input depends on the scales of the layers before it
            # No backward pass follows: keep nothing for it, even where training recomputes.
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_nothing, _nothing):
                self._run(batches, lambda *_, **__: None, forward_only=True)

    def accumulate(self, batches: Sequence[MicroBatch], loss_of: LossOf) -> list[dict[str, Tensor]]:
        """Forward and backward of a global batch: gradients of sum(losses) / sum(units) over all ranks.

        Returns the third value of ``loss_of`` per micro-batch (last stage only).
        """

        # Megatron adds the units of all context-parallel ranks too: they are counted on one.
        counts = parallel_state.get_context_parallel_rank() == 0

        def loss(
            batch: MicroBatch, own: MicroBatch, mine: Tensor | None, hidden: Tensor
        ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            wanted = self.settings.log.entropy
            log_probs, entropies = self._token_log_probs(batch, own, mine, hidden, entropy=wanted)
            total, units, aside = loss_of(batch, log_probs)
            if entropies is not None:
                aside["entropy"] = entropies.double().sum()
                aside["num_entropies"] = torch.tensor(float(entropies.numel()))
            units = units if counts else 0
            return total, torch.tensor(units, dtype=torch.int, device=self.device), aside

        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(batches, loss, forward_only=False)

    def gradient_norm(self) -> float:
        """Norm of the gradients from ``accumulate``, over all ranks."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def step(self, lr: float) -> float:
        """Clip and update the weights; returns the gradient norm before clipping.

        With a norm that is not finite nothing is updated. (Megatron's own ``step`` would write it into the weights.)
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["fused"] = True  # one pass over weights and moments; set here, because a loaded state overrides it
            # Megatron marks norms and biases with wd_mult = 0, but only its own scheduler reads the mark.
            group["weight_decay"] = self.settings.optimizer.weight_decay * group["wd_mult"]
        norm = self.gradient_norm()
        if not math.isfinite(norm):
            return norm
        if limit := self.settings.optimizer.clip_grad:
            for part in optimizer_parts(self.optimizer):
                if parameters := part.get_parameters():
                    clip_grad_by_total_norm_fp32(
                        parameters,
                        max_norm=limit,
                        total_norm=norm,
                        use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
                    )
        self.optimizer.step_with_ready_grads()
        if self.model[0].ddp_config.overlap_param_gather:
            self._gather_weights()
        return norm


def _nothing(saved: Any) -> Any:
    return None

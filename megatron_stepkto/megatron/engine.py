"""Megatron-Core behind a few verbs: start, score, update (checkpointing.py: load, save). One instance per process."""

from __future__ import annotations

import functools
import math
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
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

from megatron_stepkto.architectures.flops import forward_flops
from megatron_stepkto.architectures.model_config import ModelConfig
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.megatron import onednn
from megatron_stepkto.megatron import patches as cpu
from megatron_stepkto.megatron.acceleration import PLAIN, Acceleration
from megatron_stepkto.megatron.batch import Document, MicroBatch, Slot
from megatron_stepkto.megatron.context_parallel import join, own_part
from megatron_stepkto.megatron.main_weights import optimizer_parts
from megatron_stepkto.megatron.model import build_model_chunks, transformer_config
from megatron_stepkto.megatron.state import Checkpoints
from megatron_stepkto.recipe import keys as recipe

CALIBRATION_PASSES = 3

T = TypeVar("T")
LossOf = Callable[[MicroBatch, Tensor], tuple[Tensor, int, dict[str, Tensor]]]


def threads_per_rank(ranks: int) -> int:
    """Cores that this process may use (a container's, not the host's), shared by the ranks."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def join_ranks(parallel: recipe.Parallel, device: torch.device, timeout_s: float) -> None:
    """Join the ranks that torchrun (or Slurm) started.

    Raises:
        UserError: the number of processes is not the recipe's.
    """
    on_cpu = device.type == "cpu"
    if on_cpu:
        cpu.install()
        torch.set_num_threads(threads_per_rank(parallel.ranks))
    else:
        cpu.check_megatron_version()
        cpu.patch_expert_router()
        cpu.patch_distributed_optimizer_load()  # torch's AdamW is also the GPU's without Transformer Engine and Apex
        cpu.patch_distributed_optimizer_save()
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if on_cpu else "nccl", timeout=timedelta(seconds=timeout_s))
    if dist.get_world_size() != parallel.ranks:
        raise UserError(
            f"train.parallel.ranks is {parallel.ranks}, but {dist.get_world_size()} processes were started; "
            "make them equal"
        )
    if on_cpu:
        everywhere = torch.tensor(int(onednn.is_faster()))
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)  # a node of another kind: then no rank, not some of them
        if everywhere.item():
            onednn.use_for_matrix_products()


def lay_out(parallel: recipe.Parallel, timeout_s: float) -> None:
    """Make Megatron-Core's groups of this layout. Every group gets the time limit: its default is 30 minutes."""
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=timeout_s / 60,  # becomes a timedelta, which takes fractions
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
    )
    # Nothing random is left in a pass (no dropout); Megatron's tracker wants a seed all the same.
    tensor_parallel.model_parallel_cuda_manual_seed(1)


class Engine:
    """A model on this rank's place in the layout, with its optimizer and its ``checkpoints``.

    Args:
        train: False for passes without gradient: no optimizer.
    """

    def __init__(
        self,
        config: ModelConfig,
        settings: recipe.Training,
        device: torch.device,
        acceleration: Acceleration = PLAIN,
        *,
        train: bool = True,
    ) -> None:
        self.config, self.settings, self.device, self.acceleration = config, settings, device, acceleration
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
        parallel = settings.parallel
        self.megatron = transformer_config(
            config,
            parallel,
            self.dtype,
            acceleration,
            on_cpu=device.type == "cpu",
            recompute=settings.recompute,
        )
        self.policies = build_model_chunks(config, self.megatron, acceleration)
        for policy in self.policies:
            policy.to(device)
        modules: list[Any] = list(self.policies)
        if self.dtype == torch.bfloat16:
            modules = [Float16Module(self.megatron, module) for module in modules]
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=parallel.distributed_optimizer,
            **acceleration.data_parallel_fields(),
        )
        self.model = [
            DistributedDataParallel(self.megatron, ddp, module, disable_bucketing=index > 0)
            for index, module in enumerate(modules)
        ]
        self.optimizer: Any = None
        self.megatron.finalize_model_grads_func = finalize_model_grads
        if train:
            self._make_optimizer()
        self.checkpoints = Checkpoints(self.policies, self.model, self.optimizer, self.dtype, acceleration)
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
            ),
            self.model,
        )
        self.megatron.grad_scale_func = self.optimizer.scale_loss

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
        the pairs. Recomputed activations, the KL pass and padding are not counted: they are costs, not work.
        """
        size, response = len(document), len(document.response)
        layer, head = forward_flops(self.config, size, response, size)
        return 3 * (self.config.num_layers * layer + head)

    # --- passes --------------------------------------------------------------------------------------------

    def _run(self, batches: Sequence[MicroBatch], loss_of: Callable[..., Any], *, forward_only: bool) -> list[Any]:
        # Megatron's mixed-precision wrapper would hand the head float32 hidden states: twice the memory, and another
        # dtype than the head's weight. The head itself computes in float32.
        extra = {"fp32_output": False} if self.dtype == torch.bfloat16 else {}

        def forward_step(batches_left: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(batches_left)
            own, mine = self._own_part(batch)
            hidden = model(own.tokens, own.position_ids, None, packed_seq_params=own.packed, **extra)
            return hidden, functools.partial(loss_of, batch, own, mine)

        iterators = [iter(batches) for _ in self.model]
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

    def _own_part(self, batch: MicroBatch) -> tuple[MicroBatch, Tensor | None]:
        """What of a micro-batch this rank holds, under context parallelism; else all of it."""
        ranks = self.settings.parallel.context
        return own_part(batch, parallel_state.get_context_parallel_rank(), ranks) if ranks > 1 else (batch, None)

    def _token_log_probs(
        self, batch: MicroBatch, own: MicroBatch, mine: Tensor | None, hidden: Tensor, *, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """[R] log-probs of the whole micro-batch's response tokens, and on request the entropies there."""
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

    def calibrate(self, batches: Sequence[MicroBatch]) -> None:
        """Show delayed FP8 scaling some values before its first use: it rounds by the largest of earlier passes.

        It begins with a scale of 1, under which a weight of 0.02 keeps about two bits, and looks only at passes with
        gradients: the reference's log-probs would be those of another model than the one that trains.
        """
        if not self.acceleration.rounds_by_history:
            return
        for chunk in self.model:
            chunk.eval()
        for _ in range(CALIBRATION_PASSES):  # what a layer reads depends on how those before it were rounded
            # No backward pass follows: nothing is kept for it, also where training recomputes.
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_nothing, _nothing):
                self._run(batches, lambda *_, **__: None, forward_only=True)

    def accumulate(self, batches: Sequence[MicroBatch], loss_of: LossOf) -> list[dict[str, Tensor]]:
        """Forward and backward of a global batch: gradients of sum(losses) / sum(units) over all ranks.

        Returns what ``loss_of`` put aside per micro-batch (last stage only).
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
        """Norm of the gradients that ``accumulate`` left, over all ranks."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def step(self, lr: float) -> float:
        """Clip and update the weights; returns the gradient norm before clipping.

        With a norm that is not finite nothing is updated. (Megatron's own ``step``, which this spells out, would
        write it into the weights.)
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["fused"] = True  # one pass over weights and moments; set here, as a loaded state brings its own
            # Megatron marks norms and biases with wd_mult = 0, but only its own scheduler reads the mark.
            group["weight_decay"] = self.settings.optimizer.weight_decay * group["wd_mult"]
        norm = self.gradient_norm()
        if not math.isfinite(norm):
            return norm
        if limit := self.settings.optimizer.clip_grad:
            for part in optimizer_parts(self.optimizer):
                if parameters := part.get_parameters():
                    clip_grad_by_total_norm_fp32(parameters, max_norm=limit, total_norm=norm)
        self.optimizer.step_with_ready_grads()
        return norm


def _nothing(saved: Any) -> Any:
    return None

"""Megatron-Core behind five verbs: start, load, score, update, save. One instance per process."""

from __future__ import annotations

import functools
import math
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core import optimizer as megatron_optimizer
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.validation import StrictHandling
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

from megatron_stepkto import cpu, onednn, recipe
from megatron_stepkto.acceleration import PLAIN, Acceleration
from megatron_stepkto.checkpoints.architecture import ModelConfig
from megatron_stepkto.checkpoints.metadata import read_metadata
from megatron_stepkto.context_parallel import join, own_part
from megatron_stepkto.errors import UserError
from megatron_stepkto.model import PolicyModel, build_model_chunks, transformer_config
from megatron_stepkto.planning.times import forward_flops
from megatron_stepkto.processes import die_with_parent
from megatron_stepkto.training.documents import Document, MicroBatch, Slot
from megatron_stepkto.training.main_weights import load_main_weights, whole_main_weights

EXTRA = "_extra_state"
CALIBRATION_PASSES = 3

T = TypeVar("T")
LossOf = Callable[[MicroBatch, Tensor], tuple[Tensor, int, dict[str, Tensor]]]


def choose_device(wanted: str) -> torch.device:
    """Raises UserError when a GPU is asked for and none is there: nothing falls back silently."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is cuda, but torch sees no GPU; install the CUDA build of torch or set it to cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


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
    """A model on this rank's place in the layout, with its optimizer.

    Args:
        optimizer: None for passes without training.
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
        self._saves = AsyncCallsQueue()
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
        if not self.rounds_by_history:
            return
        for chunk in self.model:
            chunk.eval()
        for _ in range(CALIBRATION_PASSES):  # what a layer reads depends on how those before it were rounded
            # No backward pass follows: nothing is kept for it, also where training recomputes.
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_nothing, _nothing):
                self._run(batches, lambda *_, **__: None, forward_only=True)

    @property
    def rounds_by_history(self) -> bool:
        """Whether a layer rounds by the largest values of earlier passes (delayed FP8 scaling)."""
        return self.acceleration.fp8 is not None and self.acceleration.fp8.scaling == "delayed"

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
            for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
                if parameters := part.get_parameters():
                    clip_grad_by_total_norm_fp32(parameters, max_norm=limit, total_norm=norm)
        self.optimizer.step_with_ready_grads()
        return norm

    # --- checkpoints ---------------------------------------------------------------------------------------

    def _weights(self) -> dict[str, Any]:
        state = self._parameters()
        self._put_main_weights(state)
        return state

    def _parameters(self) -> dict[str, Any]:
        return {self._part(index): policy.sharded_state_dict() for index, policy in enumerate(self.policies)}

    def _put_main_weights(self, state: dict[str, Any]) -> None:
        """Into the places of FP8 weights, which are main weights rounded far more coarsely than bf16."""
        if self._fp8_weights:
            for index, policy in enumerate(self.policies):
                for name, value in whole_main_weights(self.optimizer, policy, self.dtype).items():
                    state[self._part(index)][name].data = value

    @property
    def _fp8_weights(self) -> bool:
        return bool(self.optimizer and self.acceleration.fp8 and self.acceleration.fp8.weights)

    def _state(self, *, loading: bool) -> dict[str, Any]:
        state = self._parameters()
        # Megatron knows a weight's optimizer state by the weight itself: main weights take its place only then.
        optimizer = self.optimizer.sharded_state_dict(
            state,
            loading,
            metadata={"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True},
        )
        self._put_main_weights(state)
        return {**state, "optimizer": optimizer}

    def load_weights(self, directory: Path) -> None:
        """Load weights saved at any layout.

        Raises:
            UserError: a weight is missing or left over, or the folder is no safe checkpoint.
        """
        loaded = self._load(directory, self._weights())
        if self._fp8_weights:
            for index, policy in enumerate(self.policies):
                load_main_weights(self.optimizer, policy, loaded[self._part(index)])
            self._quantize_main_weights()
        elif self.optimizer is not None:
            self.optimizer.reload_model_params()

    def _quantize_main_weights(self) -> None:
        """The model's FP8 weights from the main weights, on every replica, as an update leaves them."""
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            part._copy_main_params_to_model_params()
        for chunk in self.model:
            chunk.start_param_sync()

    def load_state(self, directory: Path) -> None:
        """Load weights and optimizer state saved by ``save_state``."""
        if self.settings.parallel.distributed_optimizer and megatron_optimizer.USING_PYTORCH_OPTIMIZER:
            self._allocate_optimizer_state()
        loaded = self._load(directory, self._state(loading=True))
        self.optimizer.load_state_dict(loaded["optimizer"])
        if self._fp8_weights:
            self._quantize_main_weights()
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            for state in part.optimizer.state.values():
                if "step" in state:  # Megatron gives all parameters one object: an update would count for each
                    state["step"] = state["step"].clone()

    def _allocate_optimizer_state(self) -> None:
        """torch's AdamW has no state before its first update, and the distributed optimizer asserts that it has.

        (Megatron allocates that of the fused ones, which keep no ``step`` per weight and refuse to save one.)
        """
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            for group in part.optimizer.param_groups:
                for weight in group["params"]:
                    state = part.optimizer.state[weight]
                    if not state:
                        state["step"] = torch.zeros((), dtype=torch.float32)
                        state["exp_avg"] = torch.zeros_like(weight)
                        state["exp_avg_sq"] = torch.zeros_like(weight)

    def _load(self, directory: Path, state: dict[str, Any]) -> dict[str, Any]:
        # It refuses a pickle that would run code, before Megatron's own loader reads it.
        known = read_metadata(directory).state_dict_metadata
        if not (directory / "common.pt").is_file() and cpu.check_megatron_version().startswith("0.16."):
            raise UserError(
                f"{directory}: written by megatron-core 0.17 or newer (it has no common.pt), which 0.16 cannot read; "
                "go on in the environment that wrote it (make megatron-019)"
            )
        absent = _take_absent_extra_states(state, known)
        if absent and "optimizer" in state and self.rounds_by_history:
            names = ", ".join(name for _, name in absent[:5])
            raise UserError(
                f"{directory}: holds no scales of delayed FP8 ({names}, ...): training would go on with others; go on "
                "with the fp8 settings that it was saved with, or remove it to start from the checkpoint before"
            )
        # Megatron calls "missing" what the checkpoint holds and nobody asked for, and "unexpected" what it lacks.
        loaded, unasked, lacking = dist_checkpointing.load(state, str(directory), strict=StrictHandling.RETURN_ALL)
        left_over = {key for key in map(str, unasked) if not key.startswith("optimizer.") and EXTRA not in key}
        missing: list[list[str]] = [[]] * dist.get_world_size()  # each rank asks for its own part of the model
        dist.all_gather_object(missing, sorted(map(str, lacking)))
        all_missing = sorted({key for keys in missing for key in keys})
        if all_missing or left_over:
            raise UserError(
                f"{directory}: not a checkpoint of this model; missing: {all_missing}, left over: {sorted(left_over)}"
            )
        for part, name in absent:
            loaded[part][name] = None
        for index, policy in enumerate(self.policies):
            policy.load_state_dict(loaded[self._part(index)], strict=True)
            _zero_vocab_padding(policy)
        return dict(loaded)

    def _part(self, index: int) -> str:
        """Name of a chunk's weights in a checkpoint's state."""
        return "model" if len(self.policies) == 1 else f"model{index}"

    def save_weights(self, directory: Path) -> None:
        self._save(self._weights(), directory)

    def save_state(self, directory: Path) -> None:
        self._save(self._state(loading=False), directory)

    def begin_saving_state(self, directory: Path, finished: Callable[[], None]) -> None:
        """As ``save_state``, by a forked process per rank that writes a snapshot while the training goes on.

        ``finished`` runs on every rank, in a later ``finish_saving``, when all ranks have written.
        """
        self._make(directory)
        # From 0.17 on Megatron asks for nvidia-resiliency-ext unless its own writer is named.
        own_writer = {} if cpu.check_megatron_version().startswith("0.16.") else {"async_strategy": "mcore"}
        request = dist_checkpointing.save(
            self._state(loading=False), str(directory), ("torch_dist", 1), async_sharded_save=True, **own_writer
        )
        assert request is not None
        request.add_finalize_fn(finished)
        if request.async_fn is not None:
            request = request._replace(async_fn=functools.partial(_tied, request.async_fn))
        self._saves.schedule_async_request(request)

    def finish_saving(self, *, wait: bool) -> None:
        """Complete what ``begin_saving_state`` began: all of it, or what is written by now. Every rank calls it."""
        self._saves.maybe_finalize_async_calls(blocking=wait)

    def _make(self, directory: Path) -> None:
        if dist.get_rank() == 0:
            directory.mkdir(parents=True, exist_ok=True)
        dist.barrier()

    def _save(self, state: dict[str, Any], directory: Path) -> None:
        self._make(directory)
        dist_checkpointing.save(state, str(directory), ("torch_dist", 1))
        dist.barrier()


def _nothing(saved: Any) -> Any:
    return None


def _take_absent_extra_states(state: dict[str, Any], known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Take out of ``state`` what Transformer Engine's modules keep beside their weights (scales of delayed FP8) and a
    checkpoint lacks that other layers wrote, or a conversion; returns the (part, name) of each."""
    absent = [
        (part, name)
        for part, weights in state.items()
        if part != "optimizer"
        for name, value in weights.items()
        if isinstance(value, ShardedObject) and EXTRA in value.key and value.unique_key not in known
    ]
    for part, name in absent:
        del state[part][name]
    return absent


def _tied(write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """In a forked writer: it must not go on writing when its rank is killed, beside the one that runs again."""
    die_with_parent()
    write(*args, **kwargs)


def _zero_vocab_padding(policy: PolicyModel) -> None:
    """Rows that pad the vocabulary are in no checkpoint: give them one value, so that runs are reproducible."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    weights = []
    if policy.pre_process:
        weights.append(policy.embedding.word_embeddings.weight)
    if policy.post_process and getattr(policy.output_layer, "weight", None) is not None:
        weights.append(policy.output_layer.weight)
    with torch.no_grad():
        for weight in weights:
            weight[max(0, policy.words - rank * weight.shape[0]) :] = 0

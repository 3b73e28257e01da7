"""Checkpoints of a training in Megatron's ``torch_dist`` format: written at one layout, read at any.

Weights alone (``load_weights``, ``save_weights``) are the folders that ``stepkto convert`` writes and reads; a state
(``load_state``, ``save_state``) also holds the optimizer's, to resume from. Of a model with adapters, which never
changes its base, ``load_weights`` reads the base, and everything else writes and reads the adapters alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core import optimizer as megatron_optimizer
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_stepkto.architectures.adapters import ADAPTER
from megatron_stepkto.base.errors import MachineFault, UserError
from megatron_stepkto.base.storage import check_space, is_nearly_full, refusal, writing
from megatron_stepkto.checkpoints.metadata import check_format, read_metadata
from megatron_stepkto.checkpoints.unpickling import blame, plain_layer_state
from megatron_stepkto.megatron.acceleration import Acceleration
from megatron_stepkto.megatron.lora import adapters_of
from megatron_stepkto.megatron.main_weights import load_main_weights, optimizer_parts, whole_main_weights
from megatron_stepkto.megatron.model import PolicyModel
from megatron_stepkto.megatron.patches import plain_objects_only
from megatron_stepkto.megatron.version import async_writer, needs_common_pt

EXTRA = "_extra_state"


def _is_adapter(name: str) -> bool:
    return f".{ADAPTER}." in name


class Checkpoints:
    """Loads and saves one rank's shard of a model and its optimizer. Every method is collective.

    Args:
        policies: the model's virtual pipeline chunks.
        chunks: the same, as wrapped for data parallelism.
        optimizer: Megatron's; None for a model that does not train.
        dtype: of the weights.
        ready: waits until the weights are those of the last update.
    """

    def __init__(
        self,
        policies: Sequence[PolicyModel],
        chunks: Sequence[Any],
        optimizer: Any,
        dtype: torch.dtype,
        acceleration: Acceleration,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._policies, self._chunks, self._optimizer = policies, chunks, optimizer
        self._dtype, self._acceleration, self._ready = dtype, acceleration, ready
        self._saves = AsyncCallsQueue()
        self._saving = Path()  # the last checkpoint whose saving began

    def weights(self) -> dict[str, Any]:
        """This rank's shards of the weights that train, as ``save_weights`` writes them."""
        state = self._parameters(adapters=self._adapts)
        self._put_main_weights(state)
        return state

    @property
    def _adapts(self) -> bool:
        return next(adapters_of(self._policies), None) is not None

    def _parameters(self, *, adapters: bool) -> dict[str, Any]:
        """The model's weights, or those of its adapters."""
        self._ready()
        return {
            self._part(index): {
                name: value for name, value in policy.sharded_state_dict().items() if _is_adapter(name) == adapters
            }
            for index, policy in enumerate(self._policies)
        }

    def _put_main_weights(self, state: dict[str, Any]) -> None:
        """Replace FP8 weights by main weights: FP8 rounds far more coarsely than bf16."""
        if self._fp8_weights:
            for index, policy in enumerate(self._policies):
                for name, value in whole_main_weights(self._optimizer, policy, self._dtype).items():
                    state[self._part(index)][name].data = value

    @property
    def _fp8_weights(self) -> bool:
        return bool(self._optimizer and self._acceleration.fp8 and self._acceleration.fp8.weights)

    def _state(self, *, loading: bool) -> dict[str, Any]:
        state = self._parameters(adapters=self._adapts)
        # Megatron finds a weight's optimizer state by the weight object: main weights replace it only afterwards.
        optimizer = self._optimizer.sharded_state_dict(
            state,
            loading,
            metadata={"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True},
        )
        self._put_main_weights(state)
        return {**state, "optimizer": optimizer}

    def load_weights(self, directory: Path) -> None:
        """Load weights saved at any layout; of a model with adapters, its base.

        Raises:
            UserError: a weight is missing or left over, or the folder is not a safe checkpoint.
        """
        state = self._parameters(adapters=False)
        self._put_main_weights(state)
        loaded = self._load(directory, state)
        if self._fp8_weights:
            for index, policy in enumerate(self._policies):
                load_main_weights(self._optimizer, policy, loaded[self._part(index)])
            self._quantize_main_weights()
        elif self._optimizer is not None:
            self._optimizer.reload_model_params()

    def _quantize_main_weights(self) -> None:
        """The model's FP8 weights from the main weights, on every replica, as after an update."""
        for part in optimizer_parts(self._optimizer):
            part._copy_main_params_to_model_params()
        for chunk in self._chunks:
            chunk.start_param_sync()

    def load_state(self, directory: Path) -> None:
        """Load weights and optimizer state saved by ``save_state``."""
        distributed = self._chunks[0].ddp_config.use_distributed_optimizer
        if distributed and megatron_optimizer.USING_PYTORCH_OPTIMIZER:
            self._allocate_optimizer_state()
        loaded = self._load(directory, self._state(loading=True))
        self._optimizer.load_state_dict(loaded["optimizer"])
        if self._fp8_weights:
            self._quantize_main_weights()
        for part in optimizer_parts(self._optimizer):
            for state in part.optimizer.state.values():
                if (
                    "step" in state
                ):  # Megatron shares one tensor among all parameters: an update would increment it once for each
                    state["step"] = state["step"].clone()

    def _allocate_optimizer_state(self) -> None:
        """torch's AdamW has no state before its first update, and the distributed optimizer asserts that it has.

        (Megatron allocates that of the fused ones, which keep no ``step`` per weight and refuse to save one.)
        """
        for part in optimizer_parts(self._optimizer):
            for group in part.optimizer.param_groups:
                for weight in group["params"]:
                    state = part.optimizer.state[weight]
                    if not state:
                        state["step"] = torch.zeros((), dtype=torch.float32)
                        state["exp_avg"] = torch.zeros_like(weight)
                        state["exp_avg_sq"] = torch.zeros_like(weight)

    def _load(self, directory: Path, state: dict[str, Any]) -> dict[str, Any]:
        check_format(directory)
        known = read_metadata(directory).state_dict_metadata
        if not (directory / "common.pt").is_file() and needs_common_pt():
            raise UserError(
                f"{directory}: written by megatron-core 0.17 or newer (it has no common.pt), which 0.16 cannot read; "
                "resume in the environment that wrote it (make megatron-019)"
            )
        if misfits := _misfits(state, known, self._policies[0].words):
            raise UserError(f"{directory}: not a checkpoint of this model: " + "; ".join(misfits))
        reads_extra = self._acceleration.transformer_engine
        unread = _take_extra_states(state, known if reads_extra else {})
        if unread and "optimizer" in state and self._acceleration.rounds_by_history:
            names = ", ".join(name for _, name in unread[:5])
            raise UserError(
                f"{directory}: holds no scales of delayed FP8 ({names}, ...): training would continue with others; "
                "resume with the fp8 settings that it was saved with, or remove it to resume from the checkpoint before"
            )
        # Megatron calls "missing" what the checkpoint holds without being requested, and "unexpected" what it lacks.
        with plain_objects_only(), _damage_named(directory):
            loaded, unasked, lacking = dist_checkpointing.load(state, str(directory), strict=StrictHandling.RETURN_ALL)
        left_over = {key for key in map(str, unasked) if not key.startswith("optimizer.") and EXTRA not in key}
        missing: list[list[str]] = [[]] * dist.get_world_size()  # each rank requests its own part of the model
        dist.all_gather_object(missing, sorted(map(str, lacking)))
        all_missing = sorted({key for keys in missing for key in keys})
        if all_missing or left_over:
            raise UserError(
                f"{directory}: not a checkpoint of this model; missing: {all_missing}, left over: {sorted(left_over)}"
            )
        for part, name in unread:
            loaded[part][name] = None
        for index, policy in enumerate(self._policies):
            weights = {
                name: plain_layer_state(value, f"{directory}: {name}") if EXTRA in name else value
                for name, value in loaded[self._part(index)].items()
            }
            with plain_objects_only():  # Transformer Engine's older format is an archive that it loads by itself
                lacking, unknown = policy.load_state_dict(weights, strict=False)
            other = {name for name in policy.state_dict() if _is_adapter(name) != any(map(_is_adapter, weights))}
            assert set(lacking) <= other and not unknown, f"{directory}: {lacking} were not loaded, {unknown} are new"
            _zero_vocab_padding(policy)
        return dict(loaded)

    def _part(self, index: int) -> str:
        """Name of a chunk's weights in a checkpoint's state."""
        return "model" if len(self._policies) == 1 else f"model{index}"

    def save_weights(self, directory: Path) -> None:
        self._save(self.weights(), directory)

    def save_state(self, directory: Path) -> None:
        self._save(self._state(loading=False), directory)

    def begin_saving_state(self, directory: Path, finished: Callable[[], None]) -> None:
        """As ``save_state``, by a forked process per rank that writes a snapshot while training continues.

        ``finished`` runs on every rank, in a later ``finish_saving``, when all ranks have written.
        """
        state = self._state(loading=False)
        self._make(directory, state)
        request = dist_checkpointing.save(
            state, str(directory), ("torch_dist", 1), async_sharded_save=True, **async_writer()
        )
        assert request is not None
        request.add_finalize_fn(finished)
        self._saves.schedule_async_request(request)

    def finish_saving(self, *, wait: bool) -> None:
        """Complete saves of ``begin_saving_state``: all of them, or those written by now. Every rank calls it."""
        with _naming_a_full_disk(self._saving):
            self._saves.maybe_finalize_async_calls(blocking=wait)

    def _make(self, directory: Path, state: dict[str, Any]) -> None:
        """Create the folder of a checkpoint.

        Raises:
            MachineFault: on every rank, where there is no room for ``state``.
        """
        needs = [0] * dist.get_world_size()
        dist.all_gather_object(needs, _bytes_of(state))
        refused = [""]
        if dist.get_rank() == 0:
            try:
                check_space(directory, sum(needs), "this checkpoint")
                with writing(directory):
                    directory.mkdir(parents=True, exist_ok=True)
            except MachineFault as fault:
                refused = [str(fault)]
        dist.broadcast_object_list(refused)
        if refused[0]:
            raise MachineFault(refused[0])
        self._saving = directory

    def _save(self, state: dict[str, Any], directory: Path) -> None:
        self._make(directory, state)
        with _naming_a_full_disk(directory):
            dist_checkpointing.save(state, str(directory), ("torch_dist", 1))
        dist.barrier()


_DAMAGE = (CheckpointingException, pickle.UnpicklingError, LookupError, TypeError, ValueError, AttributeError)


@contextlib.contextmanager
def _damage_named(directory: Path) -> Iterator[None]:
    """Convert errors of Megatron's and torch's loaders for a damaged folder to a UserError.

    Faults of the machine (disk, memory) are raised unchanged.
    """
    faults: list[BaseException]
    try:
        yield
        return
    except CheckpointException as error:  # torch's: what each rank raised
        faults = [fault for fault, _ in error.failures.values()]
    except _DAMAGE as error:
        faults = [error]
    for fault in faults:
        if isinstance(fault, UserError | OSError | MemoryError | torch.OutOfMemoryError):
            raise fault from None
    raise UserError(f"{directory}: {blame(faults[0])}") from None


def _bytes_of(state: dict[str, Any]) -> int:
    """Bytes of the tensors that this rank writes."""
    return sum(
        value.data.nbytes
        for asked in nested_values(state)
        for value in (nested_values(asked.build()) if isinstance(asked, ShardedTensorFactory) else [asked])
        if isinstance(value, ShardedTensor) and value.data is not None and is_main_replica(value.replica_id)
    )


@contextlib.contextmanager
def _naming_a_full_disk(directory: Path) -> Iterator[None]:
    """Report a full disk as such: Megatron's writers report what failed next, a file position or an ended process."""
    try:
        yield
    except Exception as error:
        if not is_nearly_full(directory):
            raise
        raise MachineFault(refusal(directory, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))) from error


def _misfits(state: dict[str, Any], known: Mapping[str, Any], words: int) -> list[str]:
    """Weights that a checkpoint stores with another shape, or not as tensors: torch's loader would unpickle those."""
    found = []
    for value in nested_values({part: weights for part, weights in state.items() if part != "optimizer"}):
        for asked in nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]:
            if not isinstance(asked, ShardedTensor) or (entry := known.get(asked.key)) is None:
                continue
            if not isinstance(entry, TensorStorageMetadata):
                found.append(f"{asked.key} is not a tensor")
                continue
            shape, expected = tuple(entry.size), tuple(asked.global_shape)
            # Embedding and head may be padded with rows, in the checkpoint and in the model, to different sizes.
            padded = asked.allow_shape_mismatch and shape[:1] >= (words,) and shape[1:] == expected[1:]
            if shape != expected and not padded:
                found.append(f"{asked.key} is {shape}, expected {expected}")
    return sorted(set(found))


def _take_extra_states(state: dict[str, Any], known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Take out of ``state`` what Transformer Engine's modules keep beside their weights (scales of delayed FP8) and is
    not in ``known``: a checkpoint by other layers, or from a conversion, lacks it, and other layers do not read it.
    Returns the (part, name) of each."""
    unread = [
        (part, name)
        for part, weights in state.items()
        if part != "optimizer"
        for name, value in weights.items()
        if isinstance(value, ShardedObject) and EXTRA in value.key and value.unique_key not in known
    ]
    for part, name in unread:
        del state[part][name]
    return unread


def _zero_vocab_padding(policy: PolicyModel) -> None:
    """Rows that pad the vocabulary are not in checkpoints: set them to zero, so that runs are reproducible."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    weights = []
    if policy.pre_process:
        weights.append(policy.embedding.word_embeddings.weight)
    if policy.post_process and getattr(policy.output_layer, "weight", None) is not None:
        weights.append(policy.output_layer.weight)
    with torch.no_grad():
        for weight in weights:
            weight[max(0, policy.words - rank * weight.shape[0]) :] = 0

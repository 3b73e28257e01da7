"""Every patch of Megatron-Core: those that a CPU needs, and those that GPUs need too.

On the CPU: Megatron-Core asks for ``device="cuda"`` and for CUDA's current device, streams and random state in many
places. ``install()`` replaces the global ``torch`` of *named* megatron.core modules by an object that maps
these to the CPU; torch itself is unchanged, except for two Tensor methods, whose result changes only when the caller
is a megatron.core module.

On GPUs too: ``install_everywhere()`` fixes faults of Megatron-Core that do not depend on the device.

Every patched name is checked to exist, so a new Megatron-Core version fails here with a clear message and
not later with a wrong number.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from megatron_stepkto.checkpoints.metadata import read_metadata
from megatron_stepkto.megatron.version import check_megatron_version

# --- on the CPU only -----------------------------------------------------------------------------------------

# Modules whose global `torch` is replaced, each because it creates tensors on "cuda", or asks for the current
# CUDA device, a stream, a synchronisation or the CUDA random state.
PATCHED_MODULES = (
    "utils",
    "models.common.embeddings.rotary_pos_embedding",
    "transformer.utils",
    "transformer.moe.router",
    "transformer.moe.token_dispatcher",
    "tensor_parallel.layers",
    "tensor_parallel.mappings",
    "tensor_parallel.utils",
    "tensor_parallel.random",
    "pipeline_parallel.schedules",
    "pipeline_parallel.p2p_communication",
    "distributed.param_and_grad_buffer",
    "optimizer.optimizer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.state_dict_saver",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.strategies.async_utils",
)

FACTORIES = (
    *("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn"),
    *("empty_like", "zeros_like", "ones_like"),
)


_target = torch.device("cpu")  # the device that replaces CUDA


@contextlib.contextmanager
def on_meta_device() -> Iterator[None]:
    """Inside the block the meta device replaces CUDA: shapes without memory, for dry runs."""
    global _target
    _target = torch.device("meta")
    try:
        with _target:
            yield
    finally:
        _target = torch.device("cpu")


def _nothing(*_: Any, **__: Any) -> None:
    """A question of order between streams, where everything runs in order."""


# A stream, and an event of it.
_STREAM: Any = SimpleNamespace(
    wait_stream=_nothing, wait_event=_nothing, synchronize=_nothing, record_event=lambda *_: _STREAM
)


class _CpuCuda:
    """``torch.cuda`` as seen by the patched modules."""

    synchronize = empty_cache = staticmethod(_nothing)
    manual_seed = staticmethod(torch.manual_seed)
    Stream = current_stream = staticmethod(lambda *_, **__: _STREAM)
    stream = staticmethod(lambda stream: contextlib.nullcontext())

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return _target

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()


class _CpuTorch:
    """``torch`` as seen by the patched modules: factories create tensors for CUDA on the CPU."""

    cuda = _CpuCuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(name: str) -> Callable[..., torch.Tensor]:
    factory = getattr(torch, name)

    @functools.wraps(factory)
    def call(self: _CpuTorch, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is not None and str(device).startswith("cuda"):
            device = _target
        return factory(*args, device=device, **kwargs)

    return call


for _name in FACTORIES:
    setattr(_CpuTorch, _name, _on_cpu(_name))

_STAND_IN = _CpuTorch()
_installed = False


def install() -> None:
    """Make Megatron-Core run on the CPU, in this process. Idempotent.

    Raises:
        UserError: Megatron-Core is absent or of another version.
        RuntimeError: a name that must be patched does not exist.
    """
    global _installed
    if _installed:
        return
    check_megatron_version()
    for name in PATCHED_MODULES:
        module: Any = importlib.import_module(f"megatron.core.{name}")
        if getattr(module, "torch", None) is not torch:
            raise RuntimeError(f"megatron.core.{name} has no global torch to replace")
        module.torch = _STAND_IN
    _patch_rng_state()
    _patch_tensor_methods()
    _patch_experts()
    _patch_uneven_splits()
    _patch_rope()
    _patch_optimizer()
    install_everywhere()
    _installed = True


def _replace(owner: Any, name: str, value: Any) -> Any:
    """Set ``owner.name``, which must exist; returns what it was."""
    if not hasattr(owner, name):
        raise RuntimeError(f"{owner!r} has no {name} to replace")
    old = getattr(owner, name)
    setattr(owner, name, value)
    return old


def _patch_rng_state() -> None:
    """Recompute and the tensor-parallel tracker save and restore a CUDA random state: use the CPU's instead."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")

    def get_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    _replace(random, "_get_cuda_rng_state", get_state)
    _replace(random, "_set_cuda_rng_state", set_state)


def _patch_experts() -> None:
    """The all-to-all of tokens needs counts as numpy arrays; Megatron converts only tensors on a GPU."""
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")

    def as_counts(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    _replace(dispatcher, "maybe_move_tensor_to_cpu", as_counts)


def _patch_uneven_splits() -> None:
    """Ranks that share each expert gather different numbers of tokens: gloo gathers and scatters equal parts only."""
    mappings = importlib.import_module("megatron.core.tensor_parallel.mappings")

    def gather(x: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return even_gather(x, group, output_split_sizes, use_global_buffer)
        largest = max(output_split_sizes)
        padded = x.new_zeros(largest, *x.shape[1:])
        padded[: x.shape[0]] = x
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    def scatter(x: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return even_scatter(x, group, input_split_sizes, use_global_buffer)
        whole = x.contiguous().clone()
        torch.distributed.all_reduce(whole, group=group)
        return whole.split(input_split_sizes)[group.rank()].clone()

    even_gather = _replace(mappings, "_gather_along_first_dim", gather)
    even_scatter = _replace(mappings, "_reduce_scatter_along_first_dim", scatter)


def _patch_rope() -> None:
    """Megatron's own RoPE recomputes cosine and sine twice per layer: use its hook for a fused kernel instead."""
    from megatron_stepkto.megatron.layers import rotate_packed

    rope = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")
    _replace(rope, "fused_apply_rotary_pos_emb_thd", rotate_packed)


def _patch_optimizer() -> None:
    """Megatron takes the optimizer and the kernels over many tensors of Transformer Engine or Apex wherever they are
    installed, but they run on GPUs only: take those of torch.
    """
    utils = importlib.import_module("megatron.core.utils")
    optimizer, distributed, one = (
        importlib.import_module(f"megatron.core.optimizer{name}") for name in ("", ".distrib_optimizer", ".optimizer")
    )
    clip: Any = importlib.import_module("megatron.core.optimizer.clip_grads")
    _replace(optimizer, "Adam", torch.optim.AdamW)
    _replace(optimizer, "USING_PYTORCH_OPTIMIZER", True)
    _replace(distributed, "Adam", torch.optim.Adam)
    for name in ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER"):
        _replace(distributed, name, False)
    for module in (one, clip):
        _replace(module, "multi_tensor_applier", utils.local_multi_tensor_applier)
        _replace(module, "multi_tensor_scale_impl", utils.local_multi_tensor_scale)
    _replace(clip, "l2_norm_impl", _l2_norm)
    if hasattr(clip, "multi_tensor_scale_tensor_impl"):  # since Megatron-Core 0.17
        clip.multi_tensor_scale_tensor_impl = None


def _l2_norm(_: int, __: torch.Tensor, tensor_lists: list[list[torch.Tensor]], *___: Any) -> tuple[torch.Tensor, None]:
    """In pieces: on a CPU torch.norm adds squares in float32 one by one, and the norm of an embedding's 136M gradients
    comes out 0.5% too small.
    """
    pieces = [piece for tensors in tensor_lists for tensor in tensors for piece in tensor.reshape(-1).split(1 << 16)]
    return torch.norm(torch.stack([torch.norm(piece) for piece in pieces])).reshape(1), None


def _called_from_megatron() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("megatron.core")


def _patch_tensor_methods() -> None:
    """``tensor.cuda()`` stays on the CPU, and ``tensor.type()`` returns the CUDA name that the optimizer expects."""
    original_cuda = torch.Tensor.cuda
    original_type = torch.Tensor.type

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _called_from_megatron() else original_cuda(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        if not args and not kwargs and self.device.type in ("cpu", "meta") and _called_from_megatron():
            return str(answer).replace("torch.meta.", "torch.").replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.cuda = cuda  # type: ignore[assignment]
    torch.Tensor.type = type_  # type: ignore[assignment, method-assign]


# --- on GPUs too ---------------------------------------------------------------------------------------------


def install_everywhere() -> None:
    """Fix faults of Megatron-Core on every device, in this process. Call it once.

    Raises:
        UserError: Megatron-Core is absent or of another version.
        RuntimeError: a name that must be patched does not exist.
    """
    check_megatron_version()
    _patch_expert_router()
    _patch_checkpoint_without_output()
    _patch_distributed_optimizer_load()
    _patch_distributed_optimizer_save()


def _patch_expert_router() -> None:
    """Without Transformer Engine, Megatron's router fails at a name that it imports from there only."""
    utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if "te_general_gemm" not in utils.RouterGatingLinearFunction.forward.__code__.co_names:
        raise RuntimeError(f"{utils!r}: the router does not ask for te_general_gemm; remove this patch")
    if not hasattr(utils, "te_general_gemm"):
        utils.te_general_gemm = None


def _patch_checkpoint_without_output() -> None:
    """Recompute of norms takes "no FP8" for FP8 and asks Transformer Engine, which fails where that is absent."""
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    if hasattr(random, "FP8GlobalStateManager"):
        return

    def init(self: Any, fp8: Any = None) -> None:
        original(self, fp8 or None)

    original = _replace(random.CheckpointWithoutOutput, "__init__", init)


def _patch_distributed_optimizer_load() -> None:
    """torch's AdamW (that of GPUs without Transformer Engine and Apex, too) keeps a ``step`` that a fully reshardable
    checkpoint lacks per parameter: keep the optimizer's own.
    """
    optimizer = importlib.import_module("megatron.core.optimizer.distrib_optimizer").DistributedOptimizer

    def set_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> Any:
        group, index = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
        if "step" in state:
            tensors = {**tensors, "step": state["step"].clone()}
        return original(self, model_param, tensors)

    original = _replace(optimizer, "_set_main_param_and_optimizer_states", set_states)


def _patch_distributed_optimizer_save() -> None:
    """Megatron gathers a buffer's main weights and moments without the padding after its buckets, but slices weights at
    offsets that include it: those after a padded bucket would be saved, and resumed, with their neighbours' values.
    The embedding has a bucket of its own where it is tied across pipeline stages. Put the padding back.
    """
    optimizer = importlib.import_module("megatron.core.optimizer.distrib_optimizer").DistributedOptimizer

    def get_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = original(self, *args, **kwargs)
        for number, buffer in enumerate(self.buffers if state else ()):
            for tensors in state[number].values():
                for key, value in tensors.items():
                    if torch.is_tensor(value):
                        tensors[key] = _with_bucket_padding(value, buffer.buckets)
        return state

    original = _replace(optimizer, "get_parameter_state_dp_zero", get_state)


def _with_bucket_padding(values: torch.Tensor, buckets: Any) -> torch.Tensor:
    """[numbers of all buckets] -> each at its bucket's place in the buffer; unchanged where there is no padding."""
    length = buckets[-1].offset + buckets[-1].numel_unpadded
    if length == len(values):
        return values
    parts = values.split([bucket.numel_unpadded for bucket in buckets])
    padded = values.new_zeros(length)
    for bucket, part in zip(buckets, parts, strict=True):
        padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = part
    return padded


# --- on GPUs too, while a checkpoint is read ------------------------------------------------------------------

FORCE, FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def plain_objects_only() -> Iterator[None]:
    """While inside, loaders of Megatron-Core, torch and Transformer Engine build tensors and plain data only.

    ``torch.load`` takes ``weights_only`` from the environment over its caller's value (torch's loader of
    checkpoints sets the opposite), and ``.metadata`` goes through ``read_metadata``, once for every folder.

    Raises:
        RuntimeError: a name that must be replaced does not exist, or torch does not know the variable.
    """
    if FORCE not in torch.load.__code__.co_consts:
        raise RuntimeError(f"torch.load of torch {torch.__version__} does not read {FORCE}")
    if "read_metadata" not in vars(FileSystemReader):
        raise RuntimeError(f"{FileSystemReader!r} has no read_metadata to replace")
    known: dict[Path, Metadata] = {}

    def read(self: Any, *_: Any, **__: Any) -> Metadata:
        folder = Path(self.path)
        if folder not in known:
            known[folder] = read_metadata(folder)
        return known[folder]

    importlib.import_module("megatron.core.msc_utils").MultiStorageClientFeature.disable()  # it has loaders of its own
    original = FileSystemReader.read_metadata
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORCE_NOT)}
    os.environ[FORCE] = "1"
    FileSystemReader.read_metadata = read  # type: ignore[method-assign]
    try:
        yield
    finally:
        FileSystemReader.read_metadata = original  # type: ignore[method-assign]
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})

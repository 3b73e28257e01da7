"""What the recipe is for: GPUs of a cluster that are planned, or this machine; and which sampler can run here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from megatron_stepkto.architectures.layout import tensor_choices
from megatron_stepkto.architectures.model_config import Entry, ModelConfig
from megatron_stepkto.architectures.sharding import model_parameters
from megatron_stepkto.base.dtypes import gpu_count
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.processes import usable_cores
from megatron_stepkto.planning.cluster import PRESETS, Cluster
from megatron_stepkto.planning.memory import rank_capacity, stage_memory
from megatron_stepkto.planning.search import Plan, nothing_fits, propose
from megatron_stepkto.planning.times import Assumptions, Scenario, Workload, engine_gpus
from megatron_stepkto.recipe.keys import Parallel, Sampling, Training
from megatron_stepkto.sampling.engines import check_engines
from megatron_stepkto.sampling.vllm_engine import vllm_build

CPU_PARAMETERS = 1.5e9  # a larger model takes hours for a few solutions on processors
CPU_RANKS = 2
CPU_DTYPE, GPU_DTYPE = "float32", "bfloat16"  # of the training; most processors emulate bfloat16, many times slower
CPU_SHARE = 0.7  # of a rank's memory; the rest is for the sampler's leftovers and the system


@dataclass(frozen=True)
class Target:
    """Where the run will be.

    cluster: None for this machine's processors. here: the GPUs are this machine's. source: how that was decided.
    """

    cluster: Cluster | None
    here: bool
    source: str

    @property
    def gpus(self) -> int:
        return self.cluster.gpus if self.cluster else 0

    @property
    def dtype(self) -> str:
        """In which the run trains."""
        return GPU_DTYPE if self.cluster else CPU_DTYPE


def find_target(gpus: int | None, preset: str) -> Target:
    """The run's machine. gpus: wanted (0: none); None: all that are here. preset: data sheet for GPUs elsewhere."""
    seen = gpu_count()
    wanted = seen if gpus is None else gpus
    if wanted == 0:
        return Target(None, True, "--gpus 0" if gpus == 0 else "no GPU was found here and --gpus was not given")
    if wanted > seen:
        cluster = replace(PRESETS[preset], gpus=wanted)
        return Target(cluster, False, f"--gpus {wanted}, planned with the data sheet of {preset} (--cluster)")
    properties = torch.cuda.get_device_properties(0)
    known = next((name for name in PRESETS if name in properties.name.lower()), preset)
    cluster = replace(PRESETS[known], gpus=wanted, memory_gb=properties.total_memory / 1e9)
    return Target(cluster, True, f"{wanted} of {seen} GPUs found here ({properties.name})")


@dataclass(frozen=True)
class Layout:
    """``train``: the keys that a layout decides, as of ``planning.search.recipe_keys``. ``why``: its memory."""

    train: dict[str, Any]
    why: str


def cpu_layout(config: ModelConfig, entries: list[Entry], longest: int) -> Layout:
    """A layout for this machine's processors: float32, two ranks where there are two cores and memory.

    Raises:
        UserError: the model does not fit into memory for training.
    """
    two = [Parallel(ranks=CPU_RANKS, tensor=2)] if 2 in tensor_choices(config) else [Parallel(ranks=CPU_RANKS)]
    least = 0.0
    for parallel in [*(two if usable_cores() >= CPU_RANKS else []), Parallel()]:
        capacity, _ = rank_capacity(torch.device("cpu"), parallel.ranks)
        for multiple in (4, 2, 1):
            settings = _training(16).model_copy(
                update={"dtype": CPU_DTYPE, "parallel": parallel, "micro_batch_tokens": longest * multiple}
            )
            peak = stage_memory(config, entries, settings, 0, num_micro_batches=1, on_gpu=False).peak
            least = peak * parallel.ranks
            if peak <= CPU_SHARE * capacity:
                keys = {"parallel": parallel.model_dump(exclude_defaults=True), "recompute": False, "dtype": CPU_DTYPE,
                        "micro_batch_tokens": longest * multiple}  # fmt: skip
                return Layout(keys, f"{_size(peak)} of this machine's {_size(capacity * parallel.ranks)} in each rank, "
                              "estimated")  # fmt: skip
    total = psutil.virtual_memory().total
    raise UserError(
        f"training {model_parameters(entries) / 1e9:.2f}B parameters in float32 takes {_size(least)}, this machine has "
        f"{_size(total)}; give --gpus N for a cluster, or take a smaller model"
    )


def gpu_layout(
    config: ModelConfig, entries: list[Entry], cluster: Cluster, work: Workload, longest: int
) -> tuple[Layout, Plan]:
    """The planner's fastest layout that fits. Raises UserError: none does."""
    case = Scenario(config, entries, cluster, work, Assumptions())
    base = _training(work.global_batch).model_copy(update={"dtype": GPU_DTYPE})
    plans = propose(case, base, longest)
    if not plans:
        raise UserError(nothing_fits(case, base, longest, "take a smaller model"))
    plan = plans[0]
    return Layout(plan.as_dict()["train"], f"stepkto plan: {_size(plan.peak)} of {cluster.memory_gb:.0f} GB"), plan


def _training(global_batch: int) -> Training:
    return Training.model_validate({"optimizer": {"lr": 1e-6}, "global_batch_size": global_batch})


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


@dataclass(frozen=True)
class Sampler:
    """How this machine samples a few solutions. ``settings`` None: it cannot; ``why`` says so in words."""

    settings: Sampling | None
    why: str


def sampler_here(model: Path, entries: list[Entry], max_tokens: int, target: Target) -> Sampler:
    """vLLM where it is installed and takes the model, else transformers; neither where the model is too large here."""
    parameters = model_parameters(entries)
    gpus = gpu_count()
    if not any(model.glob("*.safetensors")):
        return Sampler(None, f"{model} holds no weights (*.safetensors)")
    if not gpus and parameters > CPU_PARAMETERS:
        return Sampler(
            None, f"there is no GPU here, and {parameters / 1e9:.1f}B parameters are too slow on its processors"
        )
    memory = torch.cuda.get_device_properties(0).total_memory if gpus else psutil.virtual_memory().total
    if parameters * (2 if gpus else 4) > memory / 2:
        return Sampler(None, f"{parameters / 1e9:.1f}B parameters do not fit here")
    reasons = []
    for backend in ("vllm", "transformers"):
        settings = sampling_keys(backend, max_tokens, target.dtype if target.here else "auto")
        try:
            check_engines(settings, model)
        except UserError as error:
            reasons.append(str(error))
        else:
            return Sampler(settings, "; ".join(reasons))
    return Sampler(None, "; ".join(reasons))


def sampling_keys(backend: Literal["vllm", "transformers"] | str, max_tokens: int, dtype: str) -> Sampling:
    return Sampling.model_validate(
        {"backend": backend, "max_tokens": max_tokens, "reproducible": False, "gap_problems": 0, "dtype": dtype}
    )


def engines(config: ModelConfig, entries: list[Entry], cluster: Cluster) -> tuple[int, int]:
    """(workers, GPUs of each) on a node. vLLM cuts the attention heads between an engine's GPUs."""
    node = min(cluster.gpus, cluster.gpus_per_node)
    each = engine_gpus(2.0 * model_parameters(entries), node, cluster)
    while each > 1 and (config.num_heads % each or node % each):
        each -= 1
    return max(1, node // each), each


def cpu_build() -> bool:
    try:
        return vllm_build() == "cpu"
    except UserError:
        return False

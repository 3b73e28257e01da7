"""What makes training fast on a GPU: Transformer Engine, Apex, FP8. Requested by the recipe, detected, logged.

What a recipe requires and the machine lacks is an error that names the package and the key: megatron-core itself
ignores FP8 flags without Transformer Engine, and silently trains in full precision.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
from dataclasses import dataclass
from typing import Any

import torch

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.recipe import keys as recipe

# Minimum compute capability, and the Transformer Engine release that introduced it
# (TransformerEngine/transformer_engine/pytorch/fp8.py; megatron.core.fp8_utils.get_fp8_recipe).
_NEEDS = {
    "delayed": ((8, 9), (1, 0)),
    "current": ((8, 9), (2, 2)),
    "blockwise": ((9, 0), (2, 3)),
    "mxfp8": ((10, 0), (2, 1)),
}
# megatron-core's names (TransformerConfig.fp8_recipe).
_RECIPES = {"delayed": "delayed", "current": "tensorwise", "blockwise": "blockwise", "mxfp8": "mxfp8"}
# FP8 matrix products need a multiple of this many tokens per rank: 16 for whole-tensor scales, else the block size.
_MULTIPLES = {"delayed": 16, "current": 16, "blockwise": 128, "mxfp8": 32}


@dataclass(frozen=True)
class Found:
    """A package on this machine; ``reason``: why it cannot be used. fails: it is installed, but does not load."""

    version: str | None
    reason: str = ""
    fails: bool = False


@dataclass(frozen=True)
class Machine:
    """What training may use here. capability: the GPU's compute capability, None on a CPU."""

    transformer_engine: Found
    apex: Found
    capability: tuple[int, int] | None


@dataclass(frozen=True)
class Acceleration:
    """What this run uses. transformer_engine, apex: whether; fp8: how, None for bf16 or fp32."""

    transformer_engine: bool = False
    apex: bool = False
    fp8: recipe.FP8 | None = None

    @property
    def token_multiple(self) -> int:
        """Tokens of a micro-batch, per rank, come in multiples of this many."""
        return _MULTIPLES[self.fp8.scaling] if self.fp8 else 1

    @property
    def rounds_by_history(self) -> bool:
        """Whether a layer scales by the largest values of earlier passes (delayed FP8 scaling)."""
        return self.fp8 is not None and self.fp8.scaling == "delayed"

    def transformer_fields(self) -> dict[str, Any]:
        """Of megatron-core's TransformerConfig."""
        fields: dict[str, Any] = {
            "transformer_impl": "transformer_engine" if self.transformer_engine else "local",
            # Weight gradients are added into the fp32 buffer by the matrix product itself.
            "gradient_accumulation_fusion": self.transformer_engine or self.apex,
        }
        if self.transformer_engine:
            # Megatron's own RoPE synchronises with the GPU twice per layer to read the documents' lengths.
            fields["apply_rope_fusion"] = True
        if self.fp8 is None:
            return fields
        fields |= {
            "fp8": self.fp8.format,
            "fp8_recipe": _RECIPES[self.fp8.scaling],
            "fp8_param": self.fp8.weights,
        }
        if self.fp8.scaling == "delayed":
            # megatron-core's defaults (a history of one) are not those of Transformer Engine's paper or Megatron-LM.
            fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
        if self.fp8.bf16_layers_at_start or self.fp8.bf16_layers_at_end:
            fields |= {
                "first_last_layers_bf16": True,
                "num_layers_at_start_in_bf16": self.fp8.bf16_layers_at_start,
                "num_layers_at_end_in_bf16": self.fp8.bf16_layers_at_end,
            }
        return fields

    def data_parallel_fields(self) -> dict[str, Any]:
        """Of megatron-core's DistributedDataParallelConfig."""
        return {"fp8_param_gather": bool(self.fp8 and self.fp8.weights)}

    def optimizer_fields(self) -> dict[str, Any]:
        """Of megatron-core's OptimizerConfig."""
        return {"fp8_recipe": _RECIPES[self.fp8.scaling]} if self.fp8 else {}


PLAIN = Acceleration()


def choose_device(wanted: str) -> torch.device:
    """Raises UserError when a GPU is requested and absent: there is no silent fallback."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is cuda, but torch sees no GPU; install the CUDA build of torch or set it to cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def find_machine(device: torch.device) -> Machine:
    """Detect packages by importing the modules that are used: an installed package may fail to load."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    # "apex" of the package index is another project; NVIDIA's has these. Each extension is a choice of its build.
    apex = _find("apex.optimizers", "amp_C", "fused_weight_gradient_mlp_cuda")
    return Machine(_find("transformer_engine.pytorch"), apex, capability)


def find_packages() -> Machine:
    """What a machine with the same packages and the newest GPU may use.

    A package that is installed but does not load counts: a node without a GPU may lack the driver.
    """
    here = find_machine(torch.device("cpu"))
    te, apex = _believe("transformer-engine", here.transformer_engine), _believe("apex", here.apex)
    return Machine(te, apex, max(capability for capability, _ in _NEEDS.values()))


def _believe(distribution: str, found: Found) -> Found:
    if found.fails:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return Found(importlib.metadata.version(distribution))
    return found


def _find(*modules: str) -> Found:
    package = modules[0].partition(".")[0]
    try:
        for name in modules:
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or modules[0]
        return Found(None, "not installed" if missing == package else f"installed without {missing}")
    # a build for another CUDA or torch; Transformer Engine asserts that its three packages are of one version
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        return Found(None, f"installed, but does not load: {first:.200}", fails=True)
    return Found(str(getattr(importlib.import_module(package), "__version__", "of unknown version")))


def choose(settings: recipe.Training, machine: Machine) -> Acceleration:
    """Choose what this run uses, from the recipe's settings and the machine.

    Raises:
        UserError: required and absent; names the key, the package and what was found.
    """
    te = _wanted(
        "train.transformer_engine",
        # It multiplies float32 matrices in TF32, with 11 bits; the recipe refuses "required" with float32
        settings.transformer_engine if settings.dtype == "bfloat16" else "off",
        "Transformer Engine",
        machine.transformer_engine,
        machine,
    )
    apex = _wanted(
        "train.apex",
        settings.apex,
        "NVIDIA Apex (built from source: apex on the package index is another project)",
        machine.apex,
        machine,
    )
    if settings.fp8 is not None:
        _check_fp8(settings.fp8, te, machine)
    _check_memory(settings, te, machine)
    return Acceleration(te, apex, settings.fp8)


def _wanted(key: str, wish: str, name: str, found: Found, machine: Machine) -> bool:
    usable = found.version is not None and machine.capability is not None
    if wish == "required" and not usable:
        why = "training runs on the CPU" if machine.capability is None else f"it is {found.reason}"
        raise UserError(f"{key} is required, but {why}; install {name}, or set {key} to auto or off")
    return usable and wish != "off"


def _check_fp8(fp8: recipe.FP8, te: bool, machine: Machine) -> None:
    if machine.capability is None:
        raise UserError("train.fp8 needs an NVIDIA GPU, but training runs on the CPU; remove train.fp8")
    if not te:
        raise UserError(
            f"train.fp8 needs Transformer Engine, which is {machine.transformer_engine.reason or 'switched off'}; "
            "install transformer-engine[pytorch] (and let train.transformer_engine be auto or required), or remove "
            "train.fp8"
        )
    capability, version = _NEEDS[fp8.scaling]
    if machine.capability < capability:
        possible = [name for name, (needed, _) in _NEEDS.items() if machine.capability >= needed]
        raise UserError(
            f"train.fp8.scaling: {fp8.scaling} needs a GPU of compute capability {capability[0]}.{capability[1]}, this "
            f"one has {machine.capability[0]}.{machine.capability[1]}; "
            + (f"choose one of {', '.join(possible)}" if possible else "remove train.fp8")
        )
    have = machine.transformer_engine.version or ""
    if _release(have) < version:
        raise UserError(
            f"train.fp8.scaling: {fp8.scaling} needs Transformer Engine {version[0]}.{version[1]} or newer, {have} is "
            "installed; install a newer one or choose another scaling"
        )


# The Transformer Engine release whose AdamW holds main weights as 16-bit remainders (megatron.core.optimizer_config).
_NEEDS_REMAINDERS = (2, 1)
# The one that computes norms again under FP8 (megatron.core.transformer_config).
_NEEDS_NORMS_AGAIN = (2, 6)


def _check_memory(settings: recipe.Training, te: bool, machine: Machine) -> None:
    """Check that what saves memory means something on this machine.

    Raises:
        UserError: names the key and what is missing; megatron-core would fail later, or ignore it.
    """
    optimizer = settings.optimizer
    for key, default in (
        ("optimizer.offload", "0"), ("optimizer.moment_dtype", "float32"), ("offload_layers", "0")
    ):  # fmt: skip
        section, _, name = key.rpartition(".")
        value = getattr(optimizer if section else settings, name)
        if not value or value == default:
            continue
        if machine.capability is None:
            raise UserError(
                f"train.{key}: {value} needs an NVIDIA GPU, but training runs on the CPU, whose memory holds "
                f"everything already; set it to {default}"
            )
        if not te:
            raise UserError(
                f"train.{key}: {value} needs Transformer Engine, which is "
                f"{machine.transformer_engine.reason or 'switched off'}; install transformer-engine[pytorch] (and let "
                f"train.transformer_engine be auto or required), or set it to {default}"
            )
    have = machine.transformer_engine.version or ""
    if optimizer.moment_dtype != "float32" and _release(have) < _NEEDS_REMAINDERS:
        raise UserError(
            "train.optimizer.moment_dtype: bfloat16 needs Transformer Engine 2.1 or newer, "
            f"{have} is installed; install a newer one or set it to float32"
        )
    if settings.fp8 and settings.recomputes("layernorm") and _release(have) < _NEEDS_NORMS_AGAIN:
        raise UserError(
            "train.recompute.modules: layernorm with train.fp8 needs Transformer Engine 2.6 or newer, "
            f"{have} is installed; install a newer one or leave layernorm out"
        )


def _release(version: str) -> tuple[int, ...]:
    from packaging.version import InvalidVersion, Version

    try:
        return Version(version).release[:2]
    except InvalidVersion:
        return (0, 0)


def describe(chosen: Acceleration, machine: Machine) -> str:
    """One line for the log: what is used, and why the rest is not."""
    import megatron.core.optimizer

    spec = "Transformer Engine layers" if chosen.transformer_engine else "local layers"
    parts = [f"{spec} ({_state(chosen.transformer_engine, machine.transformer_engine, 'transformer-engine')})"]
    parts.append(_state(chosen.apex, machine.apex, "apex"))
    parts.append(f"Adam of {megatron.core.optimizer.Adam.__module__.partition('.')[0]}")
    if chosen.fp8:
        ends = f", {chosen.fp8.bf16_layers_at_start} first and {chosen.fp8.bf16_layers_at_end} last layers in bf16"
        weights = ", weights in FP8" if chosen.fp8.weights else ""
        parts.append(f"FP8 {chosen.fp8.format}, {chosen.fp8.scaling} scaling{ends}{weights}")
    return "; ".join(parts)


def _state(used: bool, found: Found, name: str) -> str:
    if used:
        return f"{name} {found.version}"
    return f"{name} not used: {found.reason or 'switched off, float32, or no GPU'}"

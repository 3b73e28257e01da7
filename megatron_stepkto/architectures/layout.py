"""Which layouts a model can be trained in: one check, shared by planning, the pipeline and the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.recipe.keys import Parallel, Recompute, Training

if TYPE_CHECKING:
    from megatron_stepkto.architectures.model_config import ModelConfig

SECTION = "train.parallel"


@dataclass(frozen=True)
class Fault:
    """Why a layout is impossible. key: the recipe key to change."""

    key: str
    message: str


def layout_faults(config: ModelConfig, parallel: Parallel) -> list[Fault]:
    """Every reason why the model cannot be split this way; empty when it can."""
    return [*_tensor_faults(config, parallel), *_pipeline_faults(config, parallel), *_expert_faults(config, parallel)]


def _tensor_faults(config: ModelConfig, parallel: Parallel) -> list[Fault]:
    key, tensor = f"{SECTION}.tensor", parallel.tensor
    faults = [
        Fault(
            key,
            f"{key} = {tensor} does not divide the model's {name} ({size}); "
            f"choose one of {_listed(_common_divisors(config))}",
        )
        for name, size in _split_sizes(config)
        if size % tensor
    ]
    if tensor > config.vocab_size:
        faults.append(
            Fault(
                key,
                f"{key} = {tensor} is more than the model's vocabulary ({config.vocab_size}): "
                "a rank would hold no token; lower it",
            )
        )
    return faults


def _pipeline_faults(config: ModelConfig, parallel: Parallel) -> list[Fault]:
    layers, pipeline, virtual = config.num_layers, parallel.pipeline, parallel.virtual_pipeline or 1
    if layers % pipeline:
        key = f"{SECTION}.pipeline"
        choice = _listed(_divisors(layers))
        return [Fault(key, f"{key} = {pipeline} does not divide the model's layers ({layers}); choose one of {choice}")]
    if layers % (pipeline * virtual):
        key = f"{SECTION}.virtual_pipeline"
        choices = [d for d in _divisors(layers // pipeline) if d > 1]
        advice = f"choose one of {_listed(choices)}, or remove it" if choices else "remove it"
        return [
            Fault(
                key,
                f"{key} = {virtual} does not divide the {layers // pipeline} layers of a stage "
                f"({layers} layers over {SECTION}.pipeline = {pipeline}); {advice}",
            )
        ]
    return []


def _expert_faults(config: ModelConfig, parallel: Parallel) -> list[Fault]:
    key, expert = f"{SECTION}.expert", parallel.expert
    if config.experts is None:
        return [
            Fault(key, f"{key} = {ranks}, but the model has no experts; set it to 1")
            for key, ranks in ((key, expert), (f"{SECTION}.expert_tensor", parallel.expert_tensor))
            if ranks > 1
        ]
    faults = []
    if config.experts.number % expert:
        choice = _listed(_divisors(config.experts.number))
        message = (
            f"{key} = {expert} does not divide the model's experts ({config.experts.number}); choose one of {choice}"
        )
        faults.append(Fault(key, message))
    if config.experts.ffn_size % parallel.expert_tensor:
        key, choice = f"{SECTION}.expert_tensor", _listed(_divisors(config.experts.ffn_size))
        message = (
            f"{key} = {parallel.expert_tensor} does not divide the experts' feed-forward size "
            f"({config.experts.ffn_size}); choose one of {choice}"
        )
        faults.append(Fault(key, message))
    if parallel.tensor > 1 and not parallel.sequence:
        faults.append(
            Fault(
                f"{SECTION}.sequence",
                f"{SECTION}.sequence must be true for a mixture of experts with {SECTION}.tensor > 1: without it "
                "every tensor-parallel rank would send the same tokens to the experts",
            )
        )
    return faults


def _activation_faults(config: ModelConfig, settings: Training) -> list[Fault]:
    """What megatron-core would ignore without a word, and offload that it refuses."""
    parallel, recompute = settings.parallel, settings.recompute
    held = config.num_layers // (parallel.pipeline * (parallel.virtual_pipeline or 1))
    if settings.offload_layers >= config.num_layers:
        key = "train.offload_layers"
        message = f"{key} = {settings.offload_layers}, the model has {config.num_layers} layers; choose fewer than all"
        return [Fault(key, message)]
    if not isinstance(recompute, Recompute):
        return []
    faults = []
    for name in ("layers", "every"):
        number, key = getattr(recompute, name), f"train.recompute.{name}"
        if number is not None and number > held:
            message = f"{key} = {number}, a model chunk of this layout has {held} layers; choose at most {held}"
            faults.append(Fault(key, message))
    kind, absent = ("a mixture of experts", "mlp") if config.experts else ("dense", "moe")
    if absent in (recompute.modules or []):
        key = "train.recompute.modules"
        message = f"{key} names {absent}, which the model's layers do not have: it is {kind}; "
        faults.append(Fault(key, message + f"name {'moe' if config.experts else 'mlp'} instead"))
    return faults


def check_layout(config: ModelConfig, settings: Training, place: Callable[[str], str] | None = None) -> None:
    """Refuse a layout in which the model cannot be split, and memory keys that mean nothing for it.

    Args:
        place: location of a recipe key (``Recipe.place``), for the message.

    Raises:
        UserError: one line per fault, each naming the key to change.
    """
    refuse([*layout_faults(config, settings.parallel), *_activation_faults(config, settings)], place)


def refuse(faults: list[Fault], place: Callable[[str], str] | None = None) -> None:
    """Raises UserError with a line for each fault, if there are any."""
    if faults:
        raise UserError("\n".join(f"{place(f.key)}: {f.message}" if place else f.message for f in faults))


def _split_sizes(config: ModelConfig) -> list[tuple[str, int]]:
    """What tensor parallelism cuts into equal parts."""
    sizes = [("attention heads", config.num_heads), ("key-value heads", config.num_kv_heads)]
    return sizes if config.experts else [*sizes, ("feed-forward size", config.ffn_size)]


def tensor_choices(config: ModelConfig) -> list[int]:
    """Every tensor parallel size that the model allows."""
    return [d for d in _common_divisors(config) if d <= config.vocab_size]


def expert_choices(config: ModelConfig, stage_ranks: int) -> list[int]:
    """Every expert parallel size that the model and the ranks of a pipeline stage allow."""
    if config.experts is None:
        return [1]
    return [d for d in _divisors(config.experts.number) if not stage_ranks % d]


def _common_divisors(config: ModelConfig) -> list[int]:
    smallest = min(size for _, size in _split_sizes(config))
    return [d for d in range(1, smallest + 1) if not any(size % d for _, size in _split_sizes(config))]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if not number % d]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))

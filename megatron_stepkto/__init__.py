"""Step-KTO (arXiv 2501.10799) as a Megatron-Core extension, and as a library: ``import megatron_stepkto as sk``.

Every name of ``__all__`` is imported when it is first used, so that this import costs nothing: no torch, no
Megatron-Core, no vLLM. docs/library.md shows each.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_stepkto.base.errors import UserError as UserError
    from megatron_stepkto.checkpoints.conversion import convert as convert
    from megatron_stepkto.judging.single import judge_answer as judge_answer
    from megatron_stepkto.judging.single import judge_answers as judge_answers
    from megatron_stepkto.judging.single import label_steps as label_steps
    from megatron_stepkto.logprobs import linear_log_probs as linear_log_probs
    from megatron_stepkto.logprobs import linear_log_probs_and_entropy as linear_log_probs_and_entropy
    from megatron_stepkto.losses import RIGHT as RIGHT
    from megatron_stepkto.losses import UNJUDGED as UNJUDGED
    from megatron_stepkto.losses import WRONG as WRONG
    from megatron_stepkto.losses import Level as Level
    from megatron_stepkto.losses import LossSum as LossSum
    from megatron_stepkto.losses import PooledMean as PooledMean
    from megatron_stepkto.losses import ReferencePoints as ReferencePoints
    from megatron_stepkto.losses import Solutions as Solutions
    from megatron_stepkto.losses import StepKTOSettings as StepKTOSettings
    from megatron_stepkto.losses import clamp_reference as clamp_reference
    from megatron_stepkto.losses import dpo_loss as dpo_loss
    from megatron_stepkto.losses import irpo_loss as irpo_loss
    from megatron_stepkto.losses import kto_loss as kto_loss
    from megatron_stepkto.losses import nll_loss as nll_loss
    from megatron_stepkto.losses import pool_reference as pool_reference
    from megatron_stepkto.losses import step_kto_loss as step_kto_loss
    from megatron_stepkto.methods.registry import load_recipe as load_recipe

__version__ = "0.1.0"

# Room or module -> the names that it gives. The imports above say the same to type checkers; a test compares them.
_EXPORTS = {
    "base.errors": ("UserError",),
    "checkpoints.conversion": ("convert",),
    "judging.single": ("judge_answer", "judge_answers", "label_steps"),
    "logprobs": ("linear_log_probs", "linear_log_probs_and_entropy"),
    "losses": (
        "RIGHT", "UNJUDGED", "WRONG", "Level", "LossSum", "PooledMean", "ReferencePoints", "Solutions",
        "StepKTOSettings", "clamp_reference", "dpo_loss", "irpo_loss", "kto_loss", "nll_loss", "pool_reference",
        "step_kto_loss",
    ),
    "methods.registry": ("load_recipe",),
}  # fmt: skip
_HOME = {name: f"{__name__}.{module}" for module, names in _EXPORTS.items() for name in names}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)  # the next use finds it at once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

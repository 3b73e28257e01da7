"""A recipe's section ``judge`` as a whole: what determines its labels, and what its judges need of a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_stepkto.judging.outcome.reward_model import OutcomeRewardModel
from megatron_stepkto.judging.process.interface import Resources, Workplace
from megatron_stepkto.judging.process.registry import process_judge
from megatron_stepkto.recipe import keys as recipe


def judging_key(settings: recipe.Judging, sampler: Path | None = None, hashes: Path | None = None) -> dict[str, Any]:
    """The settings that determine the labels; a prompt or a model counts by content, not by path.

    Args:
        sampler: Hugging Face folder of the model that sampled.
        hashes: file that keeps the hashes of large folders (see ``stage.input_hash``).
    """
    place = Workplace(model=sampler, hashes=hashes)
    return {
        **settings.model_dump(mode="json", exclude={"workers", "process", "outcome"}),
        "process": process_judge(settings.process, place).key(),
        "outcome": None if settings.outcome is None else OutcomeRewardModel(settings.outcome, place).key(),
    }


def judging_resources(settings: recipe.Judging) -> list[Resources]:
    """What each judge of the section needs. They work one after another."""
    judge = process_judge(settings.process)
    needs = [each.resources() for each in judge.members().values() or [judge]]
    return needs if settings.outcome is None else [*needs, OutcomeRewardModel(settings.outcome).resources()]

"""The settings of ``stepkto measure``: a recipe's keys, all with defaults, changed by ``--set``."""

from __future__ import annotations

from pydantic import Field

from megatron_stepkto.recipe.keys import Judging, Measure, Prompt, Sampling, Section


class FolderEvaluation(Measure):
    num_problems: int | None = Field(None, ge=1, description="of each data set, from its beginning; null: all")


class ModelEvaluation(Section):
    name: str
    prompt: Prompt
    sample: Sampling
    judge: Judging
    evaluate: FolderEvaluation

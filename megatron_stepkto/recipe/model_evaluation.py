"""The settings of ``stepkto measure``: a recipe's keys, all with defaults, changed by ``--set``."""

from __future__ import annotations

from megatron_stepkto.recipe.keys import Judging, Measure, Prompt, Sampling, Section


class ModelEvaluation(Section):
    name: str
    prompt: Prompt
    sample: Sampling
    judge: Judging
    evaluate: Measure

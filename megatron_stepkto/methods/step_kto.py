"""Step-KTO (arXiv 2501.10799), and KTO (arXiv 2402.01306) as its case without a step term."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron_stepkto.losses import Balance, LossSum, ReferencePoints, StepKTOSettings, step_kto_loss
from megatron_stepkto.megatron.batch import MicroBatch
from megatron_stepkto.methods.objective import solutions_of


@dataclass(frozen=True)
class StepKTO:
    """Step-KTO, and KTO where the step weight is 0."""

    settings: StepKTOSettings
    uses_kl: bool
    balance: Mapping[str, Balance]
    uses_reference: bool = True

    @property
    def betas(self) -> tuple[float, float]:
        return self.settings.outcome.beta, self.settings.step.beta

    def loss(self, batch: MicroBatch, token_log_probs: Tensor, points: ReferencePoints) -> LossSum:
        return step_kto_loss(solutions_of(batch, token_log_probs), points, self.settings)

"""RFT: next-token loss on right solutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_stepkto.base.records import TrainExample
from megatron_stepkto.losses import LossSum, ReferencePoints, nll_loss
from megatron_stepkto.megatron.batch import MicroBatch


@dataclass(frozen=True)
class Supervised:
    """Next-token loss on the responses: RFT, and the warm-up that makes M0."""

    uses_kl: bool = False
    uses_reference: bool = False
    betas: tuple[float, float] = (0.0, 0.0)

    def units(self, examples: Sequence[TrainExample]) -> list[list[TrainExample]]:
        return [[example] for example in examples]

    def loss(self, batch: MicroBatch, token_log_probs: Tensor, points: ReferencePoints) -> LossSum:
        return nll_loss(token_log_probs)

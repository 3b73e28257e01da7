"""RFT: next-token loss on right solutions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from megatron_stepkto.losses import Balance, LossSum, ReferencePoints, nll_loss
from megatron_stepkto.megatron.batch import MicroBatch


@dataclass(frozen=True)
class Supervised:
    """Next-token loss on the responses: RFT, and the warm-up that makes M0."""

    uses_kl: bool = False
    uses_reference: bool = False
    betas: tuple[float, float] = (0.0, 0.0)
    balance: Mapping[str, Balance] = field(default_factory=dict)

    def loss(self, batch: MicroBatch, token_log_probs: Tensor, points: ReferencePoints) -> LossSum:
        return nll_loss(token_log_probs)

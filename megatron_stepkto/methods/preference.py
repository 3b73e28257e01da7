"""DPO and IRPO: losses over pairs of a right and a wrong solution of one problem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from megatron_stepkto.losses import Balance, LossSum, ReferencePoints, dpo_loss, irpo_loss
from megatron_stepkto.megatron.batch import MicroBatch
from megatron_stepkto.methods.objective import solutions_of


@dataclass(frozen=True)
class Preference:
    """DPO, and IRPO where nll_weight is not None. Documents come as chosen, rejected, chosen, rejected, ..."""

    beta: float
    nll_weight: float | None
    uses_kl: bool = False
    uses_reference: bool = True
    balance: Mapping[str, Balance] = field(default_factory=dict)

    @property
    def betas(self) -> tuple[float, float]:
        return self.beta, self.beta

    def loss(self, batch: MicroBatch, token_log_probs: Tensor, points: ReferencePoints) -> LossSum:
        log_ratio = solutions_of(batch, token_log_probs).log_ratio()
        chosen, rejected = log_ratio[0::2], log_ratio[1::2]
        won = {"pairs_right": (chosen > rejected).sum()}
        if self.nll_weight is None:
            loss = dpo_loss(chosen, rejected, self.beta)
            return replace(loss, parts={"loss_dpo": loss.total.detach(), **won})
        lengths = log_ratio.new_tensor([len(d.response) for d in batch.documents[0::2]])
        step_log_prob = batch.step_sums(token_log_probs)
        log_prob = log_ratio.new_zeros(len(batch.documents)).index_add(0, batch.step_document, step_log_prob)
        loss = irpo_loss(chosen, rejected, log_prob[0::2], lengths, self.beta, self.nll_weight)
        return replace(loss, parts={**loss.parts, **won})

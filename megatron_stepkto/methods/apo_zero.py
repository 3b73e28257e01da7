"""APO-zero for single solutions (arXiv 2408.06266, eq. 7 without pairs): right ones up, wrong ones down.

    right:  lambda_D * (1 - sigmoid(beta * r))        wrong:  lambda_U * sigmoid(beta * r)

r is the log-ratio of the whole solution. It is KTO's loss with a reference point of 0, so it needs no KL pairs. TRL
calls it ``loss_type: apo_zero_unpaired`` of its KTOTrainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_stepkto.methods.outcome import OutcomeMethod

if TYPE_CHECKING:
    from megatron_stepkto.losses import Level, LossSum, ReferencePoints, Solutions


def apo_zero_loss(batch: Solutions, level: Level) -> LossSum:
    """APO-zero, summed over solutions; one without an outcome label counts 0. Parts: loss_right, loss_wrong."""
    from megatron_stepkto.losses import RIGHT, WRONG, LossSum, kto_loss

    log_ratio, label = batch.log_ratio(), batch.outcome_label
    terms = kto_loss(log_ratio, label, log_ratio.new_zeros(()), level)
    parts = {name: terms.detach()[label == kind].sum() for name, kind in (("loss_right", RIGHT), ("loss_wrong", WRONG))}
    return LossSum(terms.sum(), label.shape[0], parts)


class APOZero(OutcomeMethod):
    name = "apo_zero"
    title = "APO-zero, unpaired"
    source = "arXiv 2408.06266"

    def solutions_loss(self, batch: Solutions, points: ReferencePoints, level: Level) -> LossSum:
        return apo_zero_loss(batch, level)

"""BCO (arXiv 2404.04656): a binary classifier of right and wrong whose logit is the shifted reward.

    right:  -lambda_D * log sigmoid(beta * r - delta)        wrong:  -lambda_U * log sigmoid(-(beta * r - delta))

r is the log-ratio of the whole solution, and delta the mean reward, beta times the mean of r. The paper has no
lambdas: 1 is its loss.

The estimator of delta: the mean over all solutions of all updates before this one, each counted as often as it
trained, at the weights of its own update; 0 at the first update. Sum and count are pooled over the ranks and
micro-batches of a global batch and kept in each checkpoint, so delta does not depend on how a batch is cut or where a
run resumes.

TRL's BCOTrainer (trl.experimental.bco in 1.0.0; 1.16.0 has none) averages over all solutions too, but adds each
micro-batch before it computes that micro-batch's loss: the micro-batches of one update see different deltas, which
include their own rewards. TRL's delta after a batch is ours at the next update. The paper's delta is the mean of the
two classes' means, which is the same where they are equally many. TRL's
``match_underlying_distribution`` is not offered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_stepkto.methods.method import Estimator
from megatron_stepkto.methods.outcome import OutcomeMethod
from megatron_stepkto.recipe import keys as recipe

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_stepkto.losses import Level, LossSum, ReferencePoints, Solutions


def bco_loss(batch: Solutions, mean_log_ratio: Tensor, level: Level) -> LossSum:
    """BCO, summed over solutions; one without an outcome label counts 0. Parts: loss_right, loss_wrong.

    Args:
        mean_log_ratio: scalar float64, nats: delta / beta. No gradient flows into it.
    """
    from torch.nn.functional import logsigmoid

    from megatron_stepkto.losses import RIGHT, WRONG, LossSum

    label = batch.outcome_label
    logit = level.beta * (batch.log_ratio() - mean_log_ratio.detach())
    right = -level.desirable_weight * logsigmoid(logit[label == RIGHT]).sum()
    wrong = -level.undesirable_weight * logsigmoid(-logit[label == WRONG]).sum()
    return LossSum(right + wrong, label.shape[0], {"loss_right": right.detach(), "loss_wrong": wrong.detach()})


class BCO(OutcomeMethod):
    name = "bco"
    title = "BCO"
    source = "arXiv 2404.04656"
    reference_levels = ("outcome",)

    def estimator(self, loss: recipe.Loss) -> Estimator:
        return "running"

    def solutions_loss(self, batch: Solutions, points: ReferencePoints, level: Level) -> LossSum:
        return bco_loss(batch, points.outcome, level)

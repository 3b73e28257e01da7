"""BCO (arXiv 2404.04656): a binary classifier of right and wrong whose logit is the shifted reward.

    right:  -lambda_D * log sigmoid(beta * r - delta)        wrong:  -lambda_U * log sigmoid(-(beta * r - delta))

r is the log-ratio of the whole solution, and delta the mean reward, beta times the mean of r. The paper has no
lambdas: 1 is its loss.

The estimator of delta: the mean over all solutions of all updates before this one, each counted as often as it
trained, at the weights of its own update; 0 at the first update. Sum and count are pooled over the ranks and
micro-batches of a global batch and kept in each checkpoint, so delta does not depend on how a batch is cut or where a
run resumes. TRL's BCOTrainer (trl.experimental.bco up to 1.0) averages over all solutions too, but adds each
micro-batch before it computes that micro-batch's loss: there, later micro-batches of one update see another delta, and
their own rewards are in it. TRL's delta after a batch is ours at the next update. The paper's delta is the mean of the
two classes' means, which is the same where they are equally many; ``match_underlying_distribution`` is not offered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_stepkto.base.records import TrainExample
from megatron_stepkto.methods.method import Estimator, Method, Metrics, Samples
from megatron_stepkto.methods.select import single_examples, with_outcome
from megatron_stepkto.recipe import keys as recipe

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_stepkto.losses import Balance, Level, LossSum, ReferencePoints, Solutions
    from megatron_stepkto.megatron.batch import MicroBatch


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


@dataclass(frozen=True)
class BCOObjective:
    level: Level
    balance: Mapping[str, Balance]

    @property
    def betas(self) -> tuple[float, float]:
        return self.level.beta, self.level.beta

    def loss(self, batch: MicroBatch, token_log_probs: Tensor, points: ReferencePoints) -> LossSum:
        from megatron_stepkto.methods.objective import solutions_of

        return bco_loss(solutions_of(batch, token_log_probs), points.outcome, self.level)


class BCO(Method):
    name = "bco"
    title = "BCO"
    source = "arXiv 2404.04656"
    needs = "a sample with a judged outcome"
    loss_keys = frozenset({"beta_outcome", "desirable_weight_outcome", "undesirable_weight_outcome", "balance"})
    dataset_keys = frozenset({"max_tokens", "max_examples_per_problem"})
    metrics: ClassVar[Metrics] = {
        "loss_right": ("loss_right", "units"),
        "loss_wrong": ("loss_wrong", "units"),
    }
    against_collapse = "loss.undesirable_weight_outcome, or raise loss.beta_outcome"
    contrasts = True
    reference_levels = ("outcome",)

    def select(self, by_problem: Samples, settings: recipe.Dataset, seed: int) -> list[TrainExample]:
        """Every sample with a judged outcome."""
        return single_examples(with_outcome(by_problem), settings, seed, kl_pairs=False)

    def estimator(self, loss: recipe.Loss) -> Estimator:
        return "running"

    def check_example(self, example: TrainExample) -> None:
        if example.outcome is None:
            raise ValueError("bco trains on solutions with a judged answer, this one's outcome is None")

    def objective(self, loss: recipe.Loss, examples: Sequence[TrainExample]) -> BCOObjective:
        from megatron_stepkto.methods.unpaired import check_classes, outcome_balance, outcome_level

        balance = outcome_balance(loss, examples)
        check_classes(self.name, {"outcome": balance})
        return BCOObjective(outcome_level(loss, balance), {"outcome": balance})

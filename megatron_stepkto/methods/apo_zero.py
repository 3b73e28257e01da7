"""APO-zero for single solutions (arXiv 2408.06266, eq. 7 without pairs): right ones up, wrong ones down.

    right:  lambda_D * (1 - sigmoid(beta * r))        wrong:  lambda_U * sigmoid(beta * r)

r is the log-ratio of the whole solution. It is KTO's loss with a reference point of 0, so it needs no KL pairs. TRL
calls it ``loss_type: apo_zero_unpaired`` of its KTOTrainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_stepkto.base.records import TrainExample
from megatron_stepkto.methods.method import Method, Metrics, Samples
from megatron_stepkto.methods.select import single_examples, with_outcome
from megatron_stepkto.recipe import keys as recipe

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_stepkto.losses import Balance, Level, LossSum, ReferencePoints, Solutions
    from megatron_stepkto.megatron.batch import MicroBatch


def apo_zero_loss(batch: Solutions, level: Level) -> LossSum:
    """APO-zero, summed over solutions; one without an outcome label counts 0. Parts: loss_right, loss_wrong."""
    from megatron_stepkto.losses import RIGHT, WRONG, LossSum, kto_loss

    log_ratio, label = batch.log_ratio(), batch.outcome_label
    terms = kto_loss(log_ratio, label, log_ratio.new_zeros(()), level)
    parts = {name: terms.detach()[label == kind].sum() for name, kind in (("loss_right", RIGHT), ("loss_wrong", WRONG))}
    return LossSum(terms.sum(), label.shape[0], parts)


@dataclass(frozen=True)
class APOZeroObjective:
    level: Level
    balance: Mapping[str, Balance]

    @property
    def betas(self) -> tuple[float, float]:
        return self.level.beta, self.level.beta

    def loss(self, batch: MicroBatch, token_log_probs: Tensor, points: ReferencePoints) -> LossSum:
        from megatron_stepkto.methods.objective import solutions_of

        return apo_zero_loss(solutions_of(batch, token_log_probs), self.level)


class APOZero(Method):
    name = "apo_zero"
    title = "APO-zero, unpaired"
    source = "arXiv 2408.06266"
    needs = "a sample with a judged outcome"
    loss_keys = frozenset({"beta_outcome", "desirable_weight_outcome", "undesirable_weight_outcome", "balance"})
    dataset_keys = frozenset({"max_tokens", "max_examples_per_problem"})
    metrics: ClassVar[Metrics] = {
        "loss_right": ("loss_right", "units"),
        "loss_wrong": ("loss_wrong", "units"),
    }
    against_collapse = "loss.undesirable_weight_outcome, or raise loss.beta_outcome"
    contrasts = True

    def select(self, by_problem: Samples, settings: recipe.Dataset, seed: int) -> list[TrainExample]:
        """Every sample with a judged outcome."""
        return single_examples(with_outcome(by_problem), settings, seed, kl_pairs=False)

    def check_example(self, example: TrainExample) -> None:
        if example.outcome is None:
            raise ValueError("apo_zero trains on solutions with a judged answer, this one's outcome is None")

    def objective(self, loss: recipe.Loss, examples: Sequence[TrainExample]) -> APOZeroObjective:
        from megatron_stepkto.methods.unpaired import check_classes, outcome_balance, outcome_level

        balance = outcome_balance(loss, examples)
        check_classes(self.name, {"outcome": balance})
        return APOZeroObjective(outcome_level(loss, balance), {"outcome": balance})

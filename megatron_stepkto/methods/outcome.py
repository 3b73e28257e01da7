"""What methods share whose loss reads the judged answers of single solutions, and no label of a step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from megatron_stepkto.base.examples import NONE, Examples, Indices
from megatron_stepkto.methods.method import Method, Metrics
from megatron_stepkto.methods.select import Candidates, Chosen, single_examples, with_outcome
from megatron_stepkto.recipe import keys as recipe

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_stepkto.losses import Balance, Level, LossSum, ReferencePoints, Solutions
    from megatron_stepkto.megatron.batch import MicroBatch


@dataclass(frozen=True)
class OutcomeObjective:
    solutions_loss: Callable[[Solutions, ReferencePoints, Level], LossSum]
    level: Level
    balance: Mapping[str, Balance]

    @property
    def betas(self) -> tuple[float, float]:
        return self.level.beta, self.level.beta

    def loss(self, batch: MicroBatch, token_log_probs: Tensor, points: ReferencePoints) -> LossSum:
        from megatron_stepkto.methods.objective import solutions_of

        return self.solutions_loss(solutions_of(batch, token_log_probs), points, self.level)


class OutcomeMethod(Method):
    """Right against wrong solutions, without KL pairs. The parts of the loss are loss_right and loss_wrong."""

    needs = "a sample with a judged outcome"
    loss_keys = frozenset({"beta_outcome", "desirable_weight_outcome", "undesirable_weight_outcome", "balance"})
    dataset_keys = frozenset({"max_tokens", "max_examples_per_problem", "wrong_per_right"})
    metrics: ClassVar[Metrics] = {"loss_right": ("loss_right", "units"), "loss_wrong": ("loss_wrong", "units")}
    against_collapse = "loss.undesirable_weight_outcome, or raise loss.beta_outcome"
    contrasts = True

    @abstractmethod
    def solutions_loss(self, batch: Solutions, points: ReferencePoints, level: Level) -> LossSum:
        """The loss, summed over solutions."""

    def select(self, by_problem: Candidates, settings: recipe.Dataset, seed: int) -> list[Chosen]:
        return single_examples(with_outcome(by_problem), settings, seed, kl_pairs=False)

    def check_examples(self, examples: Examples) -> None:
        if (wrong := np.flatnonzero(examples.outcomes() == NONE)).size:
            raise ValueError(
                f"{examples.example_id(wrong[0])}: {self.name} trains on solutions with a judged answer, this one's "
                "outcome is None"
            )

    def objective(self, loss: recipe.Loss, examples: Examples, used: Indices) -> OutcomeObjective:
        from megatron_stepkto.losses import Level
        from megatron_stepkto.methods.balances import check_classes, outcome_balance

        balance = outcome_balance(loss, examples, used)
        check_classes(self.name, {"outcome": balance})
        level = Level(loss.beta_outcome, balance.desirable_weight, balance.undesirable_weight, 1.0)
        return OutcomeObjective(self.solutions_loss, level, {"outcome": balance})

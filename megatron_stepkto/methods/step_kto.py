"""Step-KTO (arXiv 2501.10799): KTO's value function on answers and on steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_stepkto.base.examples import Examples, Indices
from megatron_stepkto.methods.method import Estimator, Method, Metrics, all_but
from megatron_stepkto.methods.select import Candidates, Chosen, single_examples
from megatron_stepkto.recipe import keys as recipe

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_stepkto.losses import Balance, LossSum, ReferencePoints, StepKTOSettings
    from megatron_stepkto.megatron.batch import MicroBatch


@dataclass(frozen=True)
class StepKTOObjective:
    """Step-KTO, and KTO where the step weight is 0."""

    settings: StepKTOSettings
    balance: Mapping[str, Balance]

    @property
    def betas(self) -> tuple[float, float]:
        return self.settings.outcome.beta, self.settings.step.beta

    def loss(self, batch: MicroBatch, token_log_probs: Tensor, points: ReferencePoints) -> LossSum:
        from megatron_stepkto.losses import step_kto_loss
        from megatron_stepkto.methods.objective import solutions_of

        return step_kto_loss(solutions_of(batch, token_log_probs), points, self.settings)


class StepKTO(Method):
    name = "step_kto"
    title = "Step-KTO"
    source = "arXiv 2501.10799"
    needs = "a sample with a judged outcome or step"
    loss_keys = all_but(recipe.Loss, "dpo_beta", "nll_weight")
    dataset_keys = all_but(recipe.Dataset, "pairs_per_problem", "right_solutions")
    metrics: ClassVar[Metrics] = {
        "loss_outcome": ("loss_outcome", "units"),
        "loss_step": ("loss_step", "units"),
    }
    against_collapse = "loss.undesirable_weight_*, or raise loss.beta_*"
    contrasts = True
    reads_steps = True
    reference_levels = ("outcome", "step")

    def select(self, by_problem: Candidates, settings: recipe.Dataset, seed: int) -> list[Chosen]:
        chosen = {problem: [s for s in samples if s.is_judged] for problem, samples in by_problem.items()}
        return single_examples(chosen, settings, seed, kl_pairs=True)

    def estimator(self, loss: recipe.Loss) -> Estimator:
        return loss.reference_point

    def step_weight(self, loss: recipe.Loss) -> float:
        return loss.step_weight

    def objective(self, loss: recipe.Loss, examples: Examples, used: Indices) -> StepKTOObjective:
        from megatron_stepkto.losses import Level, StepKTOSettings
        from megatron_stepkto.methods.balances import check_classes, outcome_balance, step_balance

        outcome, step = outcome_balance(loss, examples, used), step_balance(loss, examples, used)
        settings = StepKTOSettings(
            Level(loss.beta_outcome, outcome.desirable_weight, outcome.undesirable_weight, loss.outcome_weight),
            Level(loss.beta_step, step.desirable_weight, step.undesirable_weight, self.step_weight(loss)),
            loss.step_reduction,
        )
        levels = (("outcome", outcome, settings.outcome), ("step", step, settings.step))
        balance = {name: balance for name, balance, level in levels if level.weight}
        check_classes(self.name, balance)
        return StepKTOObjective(settings, balance)

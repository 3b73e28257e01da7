"""DPO (arXiv 2305.18290): pairs of a right and a wrong solution of one problem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from megatron_stepkto.base.examples import Examples, Indices
from megatron_stepkto.methods.method import Method, Metrics
from megatron_stepkto.methods.select import Candidates, Chosen, pair_examples
from megatron_stepkto.recipe import keys as recipe

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_stepkto.losses import Balance, LossSum, ReferencePoints
    from megatron_stepkto.megatron.batch import MicroBatch


@dataclass(frozen=True)
class PairObjective:
    """DPO, and IRPO where nll_weight is not None. Documents come as chosen, rejected, chosen, rejected, ..."""

    beta: float
    nll_weight: float | None
    balance: Mapping[str, Balance] = field(default_factory=dict)

    @property
    def betas(self) -> tuple[float, float]:
        return self.beta, self.beta

    def loss(self, batch: MicroBatch, token_log_probs: Tensor, points: ReferencePoints) -> LossSum:
        from megatron_stepkto.losses import dpo_loss, irpo_loss
        from megatron_stepkto.methods.objective import solutions_of

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


class DPO(Method):
    name = "dpo"
    title = "DPO"
    source = "arXiv 2305.18290"
    needs = "a right and a wrong sample of one problem"
    loss_keys = frozenset({"dpo_beta"})
    dataset_keys = frozenset({"max_tokens", "pairs_per_problem", "right_solutions", "flip_step_labels"})
    metrics: ClassVar[Metrics] = {
        "loss_dpo": ("loss_dpo", "units"),
        "pair_accuracy": ("pairs_right", "units"),
    }
    against_collapse = "raise loss.dpo_beta"
    paired = True

    def select(self, by_problem: Candidates, settings: recipe.Dataset, seed: int) -> list[Chosen]:
        return pair_examples(by_problem, settings, seed)

    def objective(self, loss: recipe.Loss, examples: Examples, used: Indices) -> PairObjective:
        return PairObjective(loss.dpo_beta, None)

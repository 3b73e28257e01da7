"""IRPO (arXiv 2404.19733): DPO plus the chosen solution's negative log-prob per token."""

from __future__ import annotations

from typing import ClassVar

from megatron_stepkto.base.examples import Examples, Indices
from megatron_stepkto.methods.dpo import DPO, PairObjective
from megatron_stepkto.methods.method import Metrics
from megatron_stepkto.recipe import keys as recipe


class IRPO(DPO):
    name = "irpo"
    title = "IRPO"
    source = "arXiv 2404.19733"
    loss_keys = frozenset({"dpo_beta", "nll_weight"})
    metrics: ClassVar[Metrics] = {**DPO.metrics, "loss_nll": ("loss_nll", "units")}
    against_collapse = "raise loss.nll_weight or loss.dpo_beta"

    def objective(self, loss: recipe.Loss, examples: Examples, used: Indices) -> PairObjective:
        return PairObjective(loss.dpo_beta, loss.nll_weight)

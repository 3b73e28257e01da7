"""KTO (arXiv 2402.01306): Step-KTO without a step term, on samples with a judged outcome."""

from __future__ import annotations

from megatron_stepkto.methods.select import Candidates, Chosen, single_examples, with_outcome
from megatron_stepkto.methods.step_kto import StepKTO
from megatron_stepkto.recipe import keys as recipe


class KTO(StepKTO):
    name = "kto"
    title = "KTO"
    source = "arXiv 2402.01306"
    needs = "a sample with a judged outcome"
    reads_steps = False
    dataset_keys = StepKTO.dataset_keys - {"flip_step_labels"}

    def select(self, by_problem: Candidates, settings: recipe.Dataset, seed: int) -> list[Chosen]:
        return single_examples(with_outcome(by_problem), settings, seed, kl_pairs=True)

    def step_weight(self, loss: recipe.Loss) -> float:
        return 0.0

    def check_settings(self, loss: recipe.Loss) -> None:
        if loss.outcome_weight == 0:
            raise ValueError("kto with loss.outcome_weight = 0 has no term left, so nothing would train; raise it")

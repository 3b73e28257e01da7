"""RFT (arXiv 2308.01825): next-token loss on right solutions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from megatron_stepkto.base.examples import Examples, Indices, label_of
from megatron_stepkto.methods.method import Method, Metrics
from megatron_stepkto.methods.select import Candidates, Chosen, distinct, single_examples, usable_right
from megatron_stepkto.recipe import keys as recipe

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_stepkto.losses import Balance, LossSum, ReferencePoints
    from megatron_stepkto.megatron.batch import MicroBatch


@dataclass(frozen=True)
class Supervised:
    """Next-token loss on the responses: RFT, and the warm-up that makes M0."""

    betas: tuple[float, float] = (0.0, 0.0)
    balance: Mapping[str, Balance] = field(default_factory=dict)

    def loss(self, batch: MicroBatch, token_log_probs: Tensor, points: ReferencePoints) -> LossSum:
        from megatron_stepkto.losses import nll_loss

        return nll_loss(token_log_probs)


class RFT(Method):
    name = "rft"
    title = "RFT"
    source = "arXiv 2308.01825"
    needs = "a right sample"
    loss_keys = frozenset()
    dataset_keys = frozenset({"max_tokens", "max_examples_per_problem", "right_solutions", "flip_step_labels"})
    metrics: ClassVar[Metrics] = {}
    against_collapse = "epochs"
    uses_reference = False

    def select(self, by_problem: Candidates, settings: recipe.Dataset, seed: int) -> list[Chosen]:
        chosen = {p: distinct(usable_right(samples, settings)) for p, samples in by_problem.items()}
        return single_examples(chosen, settings, seed, kl_pairs=False)

    def check_examples(self, examples: Examples) -> None:
        outcomes = examples.outcomes()
        if (wrong := np.flatnonzero(outcomes != 1)).size:
            raise ValueError(
                f"{examples.example_id(wrong[0])}: rft trains on right solutions, this one's outcome is "
                f"{label_of(outcomes[wrong[0]])}"
            )

    def objective(self, loss: recipe.Loss, examples: Examples, used: Indices) -> Supervised:
        return Supervised()

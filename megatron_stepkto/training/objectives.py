"""From a recipe's method to a loss over micro-batches: the bridge between losses.py and the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from megatron_stepkto import recipe
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import TrainExample
from megatron_stepkto.losses import (
    RIGHT,
    WRONG,
    Level,
    LossSum,
    PooledMean,
    ReferencePoints,
    Solutions,
    StepKTOSettings,
    balanced_weights,
    clamp_reference,
    dpo_loss,
    irpo_loss,
    nll_loss,
    pool_reference,
    step_kto_loss,
)
from megatron_stepkto.megatron.batch import Document, MicroBatch, kl_document, solution_document

# Sums of one micro-batch, pooled over micro-batches and ranks before anything is divided.
SUMS = (
    "loss",
    "units",
    "loss_outcome",
    "loss_step",
    "log_ratio_right",
    "num_right",
    "log_ratio_wrong",
    "num_wrong",
    "log_ratio_right_steps",
    "num_right_steps",
    "log_ratio_wrong_steps",
    "num_wrong_steps",
    "signs_right",
    "signs_right_steps",
    "loss_dpo",
    "loss_nll",
    "pairs_right",
    "entropy",
    "num_entropies",
    "kl_outcome",
    "kl_outcome_count",
    "kl_step",
    "kl_step_count",
    "tokens",
    "padding",
    "flops",
)


@dataclass(frozen=True)
class UnitDocuments:
    """The documents of one unit that the loss reads, and its KL pair."""

    documents: tuple[Document, ...]
    kl: Document | None


class Objective(Protocol):
    @property
    def uses_reference(self) -> bool: ...
    @property
    def uses_kl(self) -> bool: ...

    def units(self, examples: Sequence[TrainExample]) -> list[list[TrainExample]]:
        """Examples grouped into what must stay together."""
        ...

    @property
    def betas(self) -> tuple[float, float]:
        """Of a solution's and of a step's log-ratio: beta times it is the implicit reward."""
        ...

    def loss(self, batch: MicroBatch, token_log_probs: Tensor, points: ReferencePoints) -> LossSum: ...


def solutions_of(batch: MicroBatch, token_log_probs: Tensor) -> Solutions:
    """Log-ratios of a micro-batch's steps, with its labels."""
    log_ratio = batch.step_sums(token_log_probs) - batch.reference
    return Solutions(log_ratio, batch.step_document, batch.step_label, batch.outcome)


def reward_sums(batch: MicroBatch, token_log_probs: Tensor) -> dict[str, Tensor]:
    """Sums and counts of log-ratios by label, of solutions and of steps.

    ``signs_right`` counts those whose log-ratio has the sign of its label: above 0 where right, below where wrong.
    """
    solutions = solutions_of(batch, token_log_probs.detach())
    sums: dict[str, Tensor] = {}
    for suffix, values, labels in (
        ("", solutions.log_ratio(), solutions.outcome_label),
        ("_steps", solutions.step_log_ratio, solutions.step_label),
    ):
        for name, label in (("right", RIGHT), ("wrong", WRONG)):
            chosen = labels == label
            sums[f"log_ratio_{name}{suffix}"] = values[chosen].sum()
            sums[f"num_{name}{suffix}"] = chosen.sum().double()
        agrees = (values > 0) & (labels == RIGHT) | (values < 0) & (labels == WRONG)
        sums[f"signs_right{suffix}"] = agrees.sum().double()
    return sums


def kl_sums(batch: MicroBatch, token_log_probs: Tensor) -> dict[str, Tensor]:
    outcome, step = pool_reference(solutions_of(batch, token_log_probs))
    return {
        "kl_outcome": outcome.total,
        "kl_outcome_count": outcome.count,
        "kl_step": step.total,
        "kl_step_count": step.count,
    }


def reference_points(sums: dict[str, float], estimator: str, device: torch.device) -> ReferencePoints:
    """z_o and z_s from pooled sums; zero with the estimator ``none``."""

    def mean(name: str) -> PooledMean:
        used = estimator != "none"
        return PooledMean(
            *(
                torch.tensor(sums[key] if used else 0.0, dtype=torch.float64, device=device)
                for key in (name, f"{name}_count")
            )
        )

    return clamp_reference(mean("kl_outcome"), mean("kl_step"))


@dataclass(frozen=True)
class StepKTO:
    """Step-KTO, and KTO where the step weight is 0."""

    settings: StepKTOSettings
    uses_kl: bool
    uses_reference: bool = True

    @property
    def betas(self) -> tuple[float, float]:
        return self.settings.outcome.beta, self.settings.step.beta

    def units(self, examples: Sequence[TrainExample]) -> list[list[TrainExample]]:
        return [[example] for example in examples]

    def loss(self, batch: MicroBatch, token_log_probs: Tensor, points: ReferencePoints) -> LossSum:
        return step_kto_loss(solutions_of(batch, token_log_probs), points, self.settings)


@dataclass(frozen=True)
class Preference:
    """DPO, and IRPO where nll_weight is not None. Documents come as chosen, rejected, chosen, rejected, ..."""

    beta: float
    nll_weight: float | None
    uses_kl: bool = False
    uses_reference: bool = True

    @property
    def betas(self) -> tuple[float, float]:
        return self.beta, self.beta

    def units(self, examples: Sequence[TrainExample]) -> list[list[TrainExample]]:
        pairs: dict[str, dict[str, TrainExample]] = {}
        for example in examples:
            pairs.setdefault(example.pair_id or "", {})[example.side or ""] = example
        return [[pair["chosen"], pair["rejected"]] for pair in pairs.values()]

    def loss(self, batch: MicroBatch, token_log_probs: Tensor, points: ReferencePoints) -> LossSum:
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


@dataclass(frozen=True)
class Supervised:
    """Next-token loss on the responses: RFT, and the warm-up that makes M0."""

    uses_kl: bool = False
    uses_reference: bool = False
    betas: tuple[float, float] = (0.0, 0.0)

    def units(self, examples: Sequence[TrainExample]) -> list[list[TrainExample]]:
        return [[example] for example in examples]

    def loss(self, batch: MicroBatch, token_log_probs: Tensor, points: ReferencePoints) -> LossSum:
        return nll_loss(token_log_probs)


def make_objective(method: recipe.Method, loss: recipe.Loss, examples: Sequence[TrainExample]) -> Objective:
    """The objective of a recipe; ``examples`` are those of all ranks (``balance: auto`` counts their classes)."""
    _check_role(method, examples)
    if method == "rft":
        return Supervised()
    if method in ("dpo", "irpo"):
        return Preference(loss.dpo_beta, loss.nll_weight if method == "irpo" else None)
    outcome = (loss.desirable_weight_outcome, loss.undesirable_weight_outcome)
    step = (loss.desirable_weight_step, loss.undesirable_weight_step)
    if loss.balance == "auto":
        outcomes = [example.outcome for example in examples]
        steps = [s.label for example in examples for s in example.steps]
        outcome = balanced_weights(outcomes.count(1), outcomes.count(0), *outcome)
        step = balanced_weights(steps.count(1), steps.count(0), *step)
    settings = StepKTOSettings(
        Level(loss.beta_outcome, *outcome, loss.outcome_weight),
        Level(loss.beta_step, *step, 0.0 if method == "kto" else loss.step_weight),
        loss.step_reduction,
    )
    return StepKTO(settings, uses_kl=loss.reference_point == "mismatched")


def _check_role(method: recipe.Method, examples: Sequence[TrainExample]) -> None:
    """Raises UserError for a data set that was built for another method: it would train silently, and wrongly."""
    fix = f"build it again: `stepkto dataset` with train.method: {method}"
    sides: dict[str | None, list[str | None]] = {}
    for example in examples:
        if method == "rft" and example.outcome != 1:
            raise UserError(f"{example.example_id}: rft trains on right solutions, this one's outcome is "
                            f"{example.outcome}; {fix}")  # fmt: skip
        if (example.pair_id is not None) != (method in ("dpo", "irpo")):
            wanted = "a" if example.pair_id is None else "no"
            raise UserError(f"{example.example_id}: expected {wanted} preference pair for {method}; {fix}")
        sides.setdefault(example.pair_id, []).append(example.side)
    for pair, members in sides.items():
        if pair is not None and sorted(map(str, members)) != ["chosen", "rejected"]:
            raise UserError(f"pair {pair}: expected one chosen and one rejected example, got {members}; {fix}")


def unit_documents(unit: Sequence[TrainExample], references: dict[str, Tensor], with_kl: bool) -> UnitDocuments:
    """Documents of one unit with their reference log-probs, where these are known."""
    documents = []
    kl = None
    for example in unit:
        document = solution_document(example)
        documents.append(solution_document(example, references.get(document.key)))
        if with_kl and example.kl_partner is not None:
            key = kl_document(example, example.kl_partner).key
            kl = kl_document(example, example.kl_partner, references.get(key))
    return UnitDocuments(tuple(documents), kl)

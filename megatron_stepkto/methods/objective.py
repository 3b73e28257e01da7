"""What all objectives share: the interface to the loop, pooled sums, reference points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_stepkto.base.records import TrainExample
from megatron_stepkto.losses import (
    RIGHT,
    WRONG,
    Balance,
    LossSum,
    PooledMean,
    ReferencePoints,
    Solutions,
    clamp_reference,
    pool_reference,
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

    @property
    def betas(self) -> tuple[float, float]:
        """Of a solution's and of a step's log-ratio: beta times it is the implicit reward."""
        ...

    @property
    def balance(self) -> Mapping[str, Balance]:
        """Right against wrong in the loss, by level (outcome, step) of those that take part; empty without classes."""
        ...

    def loss(self, batch: MicroBatch, token_log_probs: Tensor, points: ReferencePoints) -> LossSum: ...


def solutions_of(batch: MicroBatch, token_log_probs: Tensor) -> Solutions:
    """Log-ratios of a micro-batch's steps, with its labels."""
    log_ratio = batch.step_sums(token_log_probs) - batch.reference
    return Solutions(log_ratio, batch.step_document, batch.step_label, batch.outcome)


def reward_sums(solutions: Solutions) -> dict[str, Tensor]:
    """Sums and counts of log-ratios by label, of solutions and of steps.

    ``signs_right`` counts those whose log-ratio has the sign of its label: above 0 where right, below where wrong.
    """
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

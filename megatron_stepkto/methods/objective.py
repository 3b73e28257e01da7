"""What the loop and the objectives share: documents of units, sums to pool, reference points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_stepkto.base.records import TrainExample
from megatron_stepkto.losses import (
    RIGHT,
    WRONG,
    PooledMean,
    ReferencePoints,
    Solutions,
    clamp_reference,
    pool_reference,
)
from megatron_stepkto.megatron.batch import Document, MicroBatch, kl_document, solution_document
from megatron_stepkto.methods.balances import labels_of
from megatron_stepkto.methods.method import Estimator


@dataclass(frozen=True)
class UnitDocuments:
    """The documents of one unit that the loss reads, and its KL pair."""

    documents: tuple[Document, ...]
    kl: Document | None


def solutions_of(batch: MicroBatch, token_log_probs: Tensor) -> Solutions:
    """Log-ratios of a micro-batch's steps, with its labels."""
    log_ratio = batch.step_sums(token_log_probs) - batch.reference
    return Solutions(log_ratio, batch.step_document, batch.step_label, batch.outcome)


def solutions_of_documents(
    documents: Sequence[Document], log_probs: Mapping[str, Tensor], references: Mapping[str, Tensor]
) -> Solutions:
    """Log-ratios and labels of scored documents; both mappings hold [S] float64 of a document's steps by its key."""
    return Solutions(
        torch.cat([log_probs[d.key] - references[d.key] for d in documents]),
        torch.repeat_interleave(torch.tensor([len(d.steps) for d in documents], dtype=torch.int64)),
        labels_of(step.label for d in documents for step in d.steps),
        labels_of(d.outcome for d in documents),
    )


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


def reference_points(sums: Mapping[str, float], estimator: Estimator, device: torch.device) -> ReferencePoints:
    """z_o and z_s from pooled sums: clamped at 0, or the mean itself for ``running``; zero for ``none``."""

    def mean(name: str) -> PooledMean:
        used = estimator != "none"
        return PooledMean(
            *(
                torch.tensor(sums[key] if used else 0.0, dtype=torch.float64, device=device)
                for key in (name, f"{name}_count")
            )
        )

    outcome, step = mean("kl_outcome"), mean("kl_step")
    if estimator == "running":
        return ReferencePoints(outcome.mean(), step.mean())
    return clamp_reference(outcome, step)


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

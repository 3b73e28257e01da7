"""What the loop and the objectives share: solutions with their log-ratios, sums to pool, reference points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_stepkto.base.examples import Examples, Indices
from megatron_stepkto.losses import (
    RIGHT,
    WRONG,
    PooledMean,
    ReferencePoints,
    Solutions,
    clamp_reference,
    pool_reference,
)
from megatron_stepkto.megatron.batch import MicroBatch
from megatron_stepkto.methods.method import Estimator


def solutions_of(batch: MicroBatch, token_log_probs: Tensor) -> Solutions:
    """Log-ratios of a micro-batch's steps, with its labels."""
    log_ratio = batch.step_sums(token_log_probs) - batch.reference
    return Solutions(log_ratio, batch.step_document, batch.step_label, batch.outcome)


def solutions_of_examples(examples: Examples, indices: Indices, log_ratio: Tensor) -> Solutions:
    """The examples with the log-ratios of all their steps, [S] float64."""
    rows = examples.sample[indices]

    def integers(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values.astype(np.int64))

    return Solutions(
        log_ratio,
        torch.repeat_interleave(integers(examples.num_steps[rows])),
        integers(examples.step_labels(rows)),
        integers(examples.outcome[rows]),
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

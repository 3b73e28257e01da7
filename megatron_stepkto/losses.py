"""Step-KTO and related losses: pure functions of log-ratios and labels.

Notation. Prompt x, solution y of steps s_1..s_S; log-ratios in nats, summed over tokens:

    r_h = sum over tokens t of step h of  log pi_theta(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)
    r   = sum over h of r_h

Shapes: N solutions hold S steps in all. Every function returns a *sum* over its units (solutions, pairs or
tokens) and how many units it ran over; the caller divides once, by the units of the whole global batch, so
that the loss does not depend on how the batch was cut into ranks and micro-batches.

Sources: Step-KTO arXiv 2501.10799; KTO arXiv 2402.01306; DPO arXiv 2305.18290; IRPO arXiv 2404.19733.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

RIGHT, WRONG, UNJUDGED = 1, 0, -1


@dataclass(frozen=True)
class Solutions:
    """Log-ratios and labels of N solutions with S steps in all.

    step_log_ratio: [S] float64, with gradient: log-ratio of each step
    step_solution:  [S] int64, the solution (0..N-1) that each step belongs to
    step_label:     [S] int64, RIGHT, WRONG or UNJUDGED
    outcome_label:  [N] int64, RIGHT, WRONG or UNJUDGED
    """

    step_log_ratio: Tensor
    step_solution: Tensor
    step_label: Tensor
    outcome_label: Tensor

    def log_ratio(self) -> Tensor:
        """[N] float64: log-ratio of each whole solution (all steps, judged or not)."""
        zeros = self.step_log_ratio.new_zeros(self.outcome_label.shape[0])
        return zeros.index_add(0, self.step_solution, self.step_log_ratio)


@dataclass(frozen=True)
class Level:
    """Value function of one level (outcome or step): its beta, lambdas and weight in the loss."""

    beta: float
    desirable_weight: float
    undesirable_weight: float
    weight: float


@dataclass(frozen=True)
class StepKTOSettings:
    outcome: Level
    step: Level
    step_reduction: str = "mean"


@dataclass(frozen=True)
class ReferencePoints:
    """z_o and z_s: scalars, float64, detached. ``clamp_reference`` makes them not negative."""

    outcome: Tensor
    step: Tensor


@dataclass(frozen=True)
class LossSum:
    """A loss summed over ``num_units``; ``parts`` are detached sums for the log."""

    total: Tensor
    num_units: int
    parts: dict[str, Tensor] = field(default_factory=dict)


def kto_loss(log_ratio: Tensor, label: Tensor, reference_point: Tensor, level: Level) -> Tensor:
    """lambda_c - v(r, z, c) per element, 0 where not judged (KTO, eq. 8).

        v(r, z, 1) = lambda_D * sigmoid(beta * (r - z));  v(r, z, 0) = lambda_U * sigmoid(beta * (z - r))

    Args:
        log_ratio: [n] float64.
        label: [n] int64.
        reference_point: scalar float64; no gradient flows into it.
    Returns:
        [n] float64.
    """
    # Labels 1, 0, -1 index (wrong, right, unjudged); made in log_ratio's own precision.
    sign = log_ratio.new_tensor([-1.0, 1.0, 0.0])[label]
    weight = log_ratio.new_tensor([level.undesirable_weight, level.desirable_weight, 0.0])[label]
    # lambda - lambda * sigmoid(a) = lambda * sigmoid(-a): no cancellation where the sigmoid is near 1.
    return weight * torch.sigmoid(-level.beta * sign * (log_ratio - reference_point.detach()))


def step_kto_loss(batch: Solutions, points: ReferencePoints, settings: StepKTOSettings) -> LossSum:
    """Step-KTO, summed over solutions:

        w_o * (lambda_c - v(r, z_o, c))  +  w_s * reduce over judged steps of (lambda_{c_h} - v(r_h, z_s, c_h))

    ``reduce`` is the mean over a solution's judged steps, or their sum. A solution without a judged step has
    no step term; one without an outcome label has no outcome term. w_s = 0 is KTO.
    """
    outcome = kto_loss(batch.log_ratio(), batch.outcome_label, points.outcome, settings.outcome)
    step = kto_loss(batch.step_log_ratio, batch.step_label, points.step, settings.step)
    step = step / step_divisors(
        batch.step_label, batch.step_solution, batch.outcome_label.shape[0], settings.step_reduction
    )
    total_outcome = settings.outcome.weight * outcome.sum()
    total_step = settings.step.weight * step.sum()
    return LossSum(
        total_outcome + total_step,
        batch.outcome_label.shape[0],
        {"loss_outcome": total_outcome.detach(), "loss_step": total_step.detach()},
    )


def step_divisors(label: Tensor, solution: Tensor, num_solutions: int, reduction: str) -> Tensor:
    """[S] float64: what each step's term is divided by: the judged steps of its solution (``mean``), or 1 (``sum``).

    Args:
        label, solution: [S] int64, as in ``Solutions``. num_solutions: N.
    """
    judged = (label != UNJUDGED).double()
    if reduction == "sum":
        return torch.ones_like(judged)
    return judged.new_zeros(num_solutions).index_add(0, solution, judged).clamp(min=1.0)[solution]


@dataclass(frozen=True)
class PooledMean:
    """A mean kept as sum and count (float64 scalars), so that ranks and micro-batches can pool before dividing."""

    total: Tensor
    count: Tensor

    def mean(self) -> Tensor:
        """Float64 scalar; 0 when nothing was counted."""
        return self.total / self.count.clamp(min=1.0)


def pool_reference(batch: Solutions) -> tuple[PooledMean, PooledMean]:
    """Sums and counts of whole-solution and judged-step log-ratios, for z_o and z_s.

    Unjudged steps (the answer line, text after the first error) are left out of z_s, which is the reference point of
    judged steps.
    """
    solution = batch.log_ratio().detach()
    judged = batch.step_label != UNJUDGED
    steps = batch.step_log_ratio.detach()[judged]
    return (
        PooledMean(solution.sum(), solution.new_tensor(float(solution.numel()))),
        PooledMean(steps.sum(), steps.new_tensor(float(steps.numel()))),
    )


def clamp_reference(outcome: PooledMean, step: PooledMean) -> ReferencePoints:
    """z = max(0, pooled mean): pool over all ranks and micro-batches first, clamp after."""
    return ReferencePoints(outcome.mean().clamp(min=0.0), step.mean().clamp(min=0.0))


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> LossSum:
    """-log sigmoid(beta * (r_chosen - r_rejected)), summed over pairs (DPO, eq. 7). chosen, rejected: [P] float64."""
    return LossSum(-logsigmoid(beta * (chosen - rejected)).sum(), chosen.shape[0])


def irpo_loss(
    chosen: Tensor, rejected: Tensor, chosen_log_prob: Tensor, chosen_length: Tensor, beta: float, nll_weight: float
) -> LossSum:
    """DPO plus alpha times the chosen solution's negative log-prob per token (IRPO, eq. 1), summed over pairs.

    Args:
        chosen, rejected: [P] log-ratios. chosen_log_prob: [P] log pi_theta(y_w | x). chosen_length: [P] tokens.
    """
    dpo = dpo_loss(chosen, rejected, beta)
    nll = -(chosen_log_prob / chosen_length).sum()
    total = dpo.total + nll_weight * nll
    return LossSum(total, dpo.num_units, {"loss_dpo": dpo.total.detach(), "loss_nll": (nll_weight * nll).detach()})


def nll_loss(token_log_prob: Tensor) -> LossSum:
    """Negative log-prob summed over tokens (supervised training; RFT when the tokens are of right solutions)."""
    return LossSum(-token_log_prob.sum(), token_log_prob.shape[0])


@dataclass(frozen=True)
class Balance:
    """The two classes of one level: how much of each enters the loss, and with which lambda.

    right, wrong: n_D and n_U, sums over right and wrong terms of the weights with which they enter the loss before
    lambda: 1 for an outcome, 1 / (judged steps of its solution) for a step that is averaged within its solution.
    """

    right: float
    wrong: float
    desirable_weight: float
    undesirable_weight: float

    @property
    def ratio(self) -> float | None:
        """lambda_D n_D / (lambda_U n_U), the pull of right over wrong; None when a class is empty."""
        if not self.right or not self.wrong:
            return None
        return self.desirable_weight * self.right / (self.undesirable_weight * self.wrong)

    def balanced(self) -> Balance:
        """One lambda raised so that the ratio is in [1, 4/3] (KTO, section 4.2, eq. 9).

        Unchanged when a class is empty.
        """
        ratio = self.ratio
        if ratio is None or 1 <= ratio <= 4 / 3:
            return self
        if ratio < 1:
            return replace(self, desirable_weight=self.desirable_weight / ratio)
        return replace(self, undesirable_weight=self.undesirable_weight * ratio / (4 / 3))


def class_balance(
    terms: Iterable[tuple[Tensor, Tensor]], desirable_weight: float, undesirable_weight: float
) -> Balance:
    """Balance of the terms of one level, which come in blocks.

    Args:
        terms: of each block, [n] integer labels and [n] float64, what each term is divided by in the loss.
    """
    # exact, rounded once: the same to the last bit on every rank, whatever its number of threads and the blocks
    sums = {RIGHT: Fraction(0), WRONG: Fraction(0)}
    for label, divisor in terms:
        for kind in sums:
            weights, counts = divisor[label == kind].reciprocal().unique(return_counts=True)
            pairs = zip(weights.tolist(), counts.tolist(), strict=True)
            sums[kind] += sum(Fraction(weight) * count for weight, count in pairs)
    return Balance(float(sums[RIGHT]), float(sums[WRONG]), desirable_weight, undesirable_weight)

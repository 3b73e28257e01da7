"""The rows of a training's ``metrics.jsonl``: the trainer writes them, the report reads them.

Declared are the numbers that are read again. A row may hold more, such as the losses of one method.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class UpdateRow(BaseModel):
    """One update. Log-ratios in nats, null where the batch had no such example."""

    model_config = ConfigDict(extra="allow", frozen=True)

    update: int
    loss: float | None = None
    loss_outcome: float | None = None
    loss_step: float | None = None
    kl_outcome: float | None = None
    kl_step: float | None = None
    z_outcome: float | None = None
    z_step: float | None = None
    log_ratio_right: float | None = None
    log_ratio_wrong: float | None = None
    log_ratio_right_steps: float | None = None
    log_ratio_wrong_steps: float | None = None
    grad_norm: float | None = None
    expert_load: float | None = None
    expert_load_worst: float | None = None
    num_right: int | None = None
    num_wrong: int | None = None
    num_right_steps: int | None = None
    num_wrong_steps: int | None = None
    tokens: int | None = None


class HeldOut(BaseModel):
    """Measured on examples that do not train, in nats."""

    model_config = ConfigDict(extra="allow", frozen=True)

    log_ratio_right: float | None = None
    log_ratio_wrong: float | None = None
    log_ratio_right_steps: float | None = None
    log_ratio_wrong_steps: float | None = None
    step_margin: float | None = None
    outcome_margin: float | None = None


class HeldOutRow(BaseModel):
    """The held-out examples after an update."""

    update: int
    held_out: HeldOut

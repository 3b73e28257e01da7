"""``summary.json`` of a finished run: the table of its models, and what its stages took."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from megatron_stepkto.evaluation.table import Row


class StageRow(BaseModel):
    """A finished stage: its folder in the run, wall-clock seconds, and what it counted."""

    name: str
    seconds: float | None = None
    counts: dict[str, Any] = Field(default_factory=dict)


class Summary(BaseModel):
    """``iterations`` and ``methods`` hold the evaluation of M0, M1, ...; ``seconds`` is the sum over stages."""

    recipe: str
    seed: int | None = None
    method: str | None = None
    iterations: list[Row] = Field(default_factory=list)
    methods: dict[str, list[Row]] = Field(default_factory=dict)
    stages: list[StageRow] = Field(default_factory=list)
    seconds: float | None = None
    seconds_of_this_command: float | None = None

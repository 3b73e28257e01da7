"""Training metrics of a run as columns that a chart can draw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import describe, read_json
from megatron_stepkto.methods.metrics import balance_text
from megatron_stepkto.training.job import NOTES, Notes
from megatron_stepkto.training.rows import HeldOut, HeldOutRow, UpdateRow

MAX_POINTS = 400  # per training: more than a chart has pixels for
COUNTS = ("num_right", "num_wrong", "num_right_steps", "num_wrong_steps", "tokens")

Column = list[float | None]


@dataclass(frozen=True)
class Training:
    """One training, by column: ``updates["loss"][i]`` belongs to ``updates["update"][i]``.

    ``totals`` are sums over all updates; ``num_updates`` counts them before the thinning for the page.
    """

    label: str
    num_updates: int
    updates: Mapping[str, Column]
    held_out: Mapping[str, Column]
    totals: Mapping[str, int]
    notes: Sequence[str] = field(default_factory=tuple)


def read_training(path: Path, label: str) -> Training:
    """Read a ``metrics.jsonl``, which a live training may still be writing.

    A last line that is cut short is left out and noted. Of two rows for one update (written before and after
    an interruption) the later one counts.

    Raises:
        UserError: any other line that does not parse, with file:line.
    """
    notes: list[str] = []
    updates: dict[int, UpdateRow] = {}
    held_out: dict[int, HeldOutRow] = {}
    lines = path.read_bytes().split(b"\n")
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        try:
            if b'"held_out"' in raw:
                measured = HeldOutRow.model_validate_json(raw)
                held_out[measured.update] = measured
            else:
                row = UpdateRow.model_validate_json(raw)
                updates[row.update] = row
        except ValidationError as error:
            if number == len(lines):
                notes.append(f"{label}: the last line of metrics.jsonl is cut short and was left out.")
                continue
            raise UserError(
                f"{path}:{number}: expected a row of training metrics, {describe(error)}; "
                "restore the file, or remove the stage folder and train again"
            ) from None
    rows = [updates[key].model_dump() for key in sorted(updates)]
    held_out_rows = [{"update": key, **held_out[key].held_out.model_dump()} for key in sorted(held_out)]
    numbers = [name for name in UpdateRow.model_fields if name != "update" and name not in COUNTS]
    broken = sum(_infinite(row[name]) for row in rows for name in numbers)
    if broken:
        notes.append(f"{label}: {broken} values are not finite (NaN or infinity): the training diverged.")
    left = path.with_name(NOTES)  # the trainer's own, left at its end
    if left.is_file():
        trainer = read_json(left, Notes)
        notes += [f"{label}, {warning}" for warning in trainer.get("warnings", [])]
        if balance := trainer.get("balance"):
            notes.append(f"{label}, {balance_text(balance)}.")
    return Training(
        label=label,
        num_updates=len(rows),
        updates=_columns(rows, ("update", *numbers)),
        held_out=_columns(held_out_rows, ("update", *HeldOut.model_fields)),
        totals={name: sum(row[name] or 0 for row in rows) for name in COUNTS},
        notes=tuple(notes),
    )


def thin(values: Column, limit: int = MAX_POINTS) -> Column:
    """At most ``limit`` values: means of equal stretches, nulls left out of each mean."""
    if len(values) <= limit:
        return values
    edges = [len(values) * i // limit for i in range(limit + 1)]
    return [mean(values[a:b]) for a, b in itertools.pairwise(edges)]


def mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _infinite(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)


def _columns(rows: Sequence[Mapping[str, float | None]], names: Iterable[str]) -> dict[str, Column]:
    """The values of each name, null where not finite, thinned."""
    return {name: thin([None if _infinite(row[name]) else row[name] for row in rows]) for name in names}

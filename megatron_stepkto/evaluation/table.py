"""Evaluations as a table of text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

Interval = tuple[float, float]


class Measures(BaseModel):
    """Numbers that the table shows: shares, null where nothing was counted."""

    num_problems: int
    pass_at_1: float | None
    pass_at_1_interval: Interval | None
    maj_at_k: float | None
    maj_at_k_interval: Interval | None
    wrong_step_share_of_correct: float | None
    wrong_step_share_of_correct_interval: Interval | None
    wrong_step_rate_in_correct: float | None
    wrong_step_rate_in_correct_interval: Interval | None


class Row(Measures):
    """The part of an evaluation's ``metrics.json`` that is read."""

    name: str
    k: int
    by: dict[str, dict[str, Measures]] = {}


def results_table(summary: Mapping[str, Any]) -> str:
    """The table that a run ends with: one line per model, with the methods compared where there are any.

    Args:
        summary: ``{"method", "iterations": [row, ...], "methods": {method: [row, ...]}}`` (the last optional).
    """
    groups: dict[str, Sequence[Mapping[str, Any]]] = {str(summary.get("method", "")): summary["iterations"]}
    groups.update(summary.get("methods") or {})
    rows = [row for group in groups.values() for row in group]
    ks = sorted({row["k"] for row in rows})
    table = Table(box=SIMPLE_HEAD, caption="[95% interval]; wrong steps: of the greedy solutions whose answer is right")
    if len(groups) > 1:
        table.add_column("method")
    table.add_column("model")
    maj = f"maj@{ks[0]}" if len(ks) == 1 else "maj@k"
    for heading in ("pass@1", maj, "right with a wrong step", "wrong steps in right", "n"):
        # wide enough for "100.0% [98.5, 100.0]": a cell must not break between value and interval
        table.add_column(heading, justify="right", min_width=20 if heading != "n" else None)
    for method, group in groups.items():
        for row in group:
            cells = [row["name"], *(_cell(row, key) for key in _COLUMNS), f"{row['num_problems']:,}"]
            table.add_row(*([method] if len(groups) > 1 else []), *cells)
        table.add_section()
    text = io.StringIO()
    Console(file=text, width=120, color_system=None, highlight=False, markup=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


_COLUMNS = ("pass_at_1", "maj_at_k", "wrong_step_share_of_correct", "wrong_step_rate_in_correct")


def _cell(row: Mapping[str, Any], key: str) -> str:
    """ "47.2% [44.1, 50.3]"; a dash where nothing was counted."""
    if row[key] is None or row[f"{key}_interval"] is None:
        return "–"
    low, high = row[f"{key}_interval"]
    return f"{100 * row[key]:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"

"""Evaluations as a table of text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_stepkto.evaluation.statistics import Interval

# In the folder of an evaluation: a Row; the judged greedy solutions.
METRICS, GREEDY = "metrics.json", "greedy.jsonl"


class Flaws(BaseModel):
    """Of a set of solutions: what is wrong inside right answers, and what the solutions look like."""

    wrong_step_share_of_correct: float | None = None
    wrong_step_share_of_correct_interval: Interval | None = None
    wrong_step_rate_in_correct: float | None = None
    wrong_step_rate_in_correct_interval: Interval | None = None
    num_correct: int | None = None
    truncated_share: float | None = None
    unparsed_share: float | None = None
    undecided_share: float | None = None
    mean_response_tokens: float | None = None


class Sampled(Flaws):
    """The same over all k samples per problem."""

    accuracy: float | None = None
    accuracy_interval: Interval | None = None


class Estimate(BaseModel):
    value: float | None
    value_interval: Interval | None


class Measures(Flaws):
    """Shares in 0..1 of the greedy solutions with 95% intervals, null where nothing was counted."""

    num_problems: int
    pass_at_1: float | None
    pass_at_1_interval: Interval | None
    cot_pass_at_1: float | None = None
    cot_pass_at_1_interval: Interval | None = None
    maj_at_k: float | None
    maj_at_k_interval: Interval | None
    # required here: the table shows them
    wrong_step_share_of_correct: float | None
    wrong_step_share_of_correct_interval: Interval | None
    wrong_step_rate_in_correct: float | None
    wrong_step_rate_in_correct_interval: Interval | None
    pass_at_k: dict[str, Estimate] = {}
    cot_pass_at_k: dict[str, Estimate] = {}
    sampled: Sampled | None = None


class Row(Measures):
    """An evaluation's ``metrics.json``: one model. ``by`` holds the same by a key of the problems and its value."""

    name: str
    split: str | None = None
    k: int
    dtype: str | None = None
    by: dict[str, dict[str, Measures]] = {}

    @classmethod
    def checked(cls, row: Mapping[str, Any]) -> dict[str, Any]:
        """``row`` as it is written: it has all that a reader needs, and nothing that a reader does not know."""
        return cls.model_validate(row, extra="forbid").model_dump(mode="json", exclude_unset=True)


def results_table(summary: Mapping[str, Any]) -> str:
    """The table that a run ends with: one line per model, with the methods compared where there are any.

    Where the problems are of several data sets, each has its lines after those of all problems.

    Args:
        summary: ``{"method", "iterations": [row, ...], "methods": {method: [row, ...]}}`` (the last optional).
    """
    groups: dict[str, Sequence[Mapping[str, Any]]] = {str(summary.get("method", "")): summary["iterations"]}
    groups.update(summary.get("methods") or {})
    rows = [row for group in groups.values() for row in group]
    ks = sorted({row["k"] for row in rows})
    table = Table(box=SIMPLE_HEAD, caption=CAPTION, pad_edge=False)
    if len(groups) > 1:
        table.add_column("method")
    table.add_column("model", overflow="fold")  # a name that is cut could be another's
    maj = f"maj@{ks[0]}" if len(ks) == 1 else "maj@k"
    for heading in ("pass@1", "CoT-\npass@1", maj, "right with\na wrong step", "wrong steps\nin right", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    for data in ("", *data_sets(rows)):
        if data:
            table.add_row(*([""] if len(groups) > 1 else []), data)
        for method, group in groups.items():
            for row in group:
                measures = of_data(row).get(data) if data else row
                if measures is not None:
                    cells = [row["name"], *(_cell(measures, key) for key in _COLUMNS), f"{measures['num_problems']:,}"]
                    table.add_row(*([method] if len(groups) > 1 else []), *cells)
            table.add_section()
    return table_text(table)


def data_sets(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of rows of several data sets, the names of these."""
    names = {name for row in rows for name in of_data(row)}
    return sorted(names) if len(names) > 1 else []


def of_data(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The measures of a row by data set."""
    found: Mapping[str, Any] = (row.get("by") or {}).get("data", {})
    return found


def table_text(table: Table) -> str:
    """As it is printed, without colours and trailing spaces."""
    text = io.StringIO()
    Console(file=text, width=120, color_system=None, highlight=False, markup=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


CAPTION = "[95% interval]; CoT-pass@1: answer and steps right; wrong steps: of right greedy solutions"
_COLUMNS = ("pass_at_1", "cot_pass_at_1", "maj_at_k", "wrong_step_share_of_correct", "wrong_step_rate_in_correct")


def _cell(row: Mapping[str, Any], key: str) -> str:
    """ "47.2% [44.1, 50.3]"; a dash where nothing was counted. 18 characters at most: four of them fit on a line."""
    value, interval = row.get(key), row.get(f"{key}_interval")
    if value is None or interval is None:
        return "–"
    if key == "cot_pass_at_1":  # no room for its interval in 120 characters
        return f"{_percent(value)}%"
    return f"{_percent(value)}% [{_percent(interval[0])}, {_percent(interval[1])}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".replace("100.0", "100")

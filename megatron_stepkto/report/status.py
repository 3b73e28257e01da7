"""``stepkto status RUN``: finished and running stages, and the table so far."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import find_files, read_json_if_there
from megatron_stepkto.base.progress import PROGRESS, read_progress
from megatron_stepkto.base.stage import MANIFEST, STARTED, Manifest
from megatron_stepkto.evaluation.table import METRICS, Row, results_table
from megatron_stepkto.run.folder import RunFolder


def status_text(run: Path) -> str:
    """Stages in the order they began, progress of the running one, and the finished evaluations.

    Raises:
        UserError: the folder is not a run.
    """
    started = find_files(run, STARTED)
    if not started:
        raise UserError(f"{run}: expected a run's folder (such as runs/mini_cpu), found no stage in it")
    lines = [_line(run, path.parent) for path in started]
    folder = RunFolder(run)
    measured = (read_json_if_there(folder.evaluation(t) / METRICS, Row) for t in folder.evaluated())
    if rows := [row for row in measured if row is not None]:
        lines += ["", results_table({"method": "this run", "iterations": rows})]
    return "\n".join(lines)


def _line(run: Path, directory: Path) -> str:
    name = str(directory.relative_to(run))
    if (manifest := read_json_if_there(directory / MANIFEST, Manifest)) is not None:
        took = datetime.timedelta(seconds=round(manifest["seconds"]))
        return f"done     {name:<28} {took}  {_counts(manifest['counts'])}"
    found = sorted(find_files(directory, PROGRESS))
    reports = [report for path in found if (report := read_progress(path))]
    shown = ", ".join(map(str, reports))
    logs = find_files(directory / "logs", "*.log")
    return f"begun    {name:<28} {shown}" + (f"  log: {logs[-1]}" if logs else "")


def _counts(counts: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in counts.items() if isinstance(value, int | float | str))

"""The report as one HTML file: styles, script and data inside, nothing fetched."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from megatron_stepkto.base.files import atomic_writer
from megatron_stepkto.evaluation.statistics import Interval
from megatron_stepkto.evaluation.table import Row, data_sets
from megatron_stepkto.report.collect import Report, collect
from megatron_stepkto.run.folder import RunFolder

FOLDER = Path(__file__).parent
ABSENT = "–"


@dataclass(frozen=True)
class Metric:
    """A rate that the table and the curves show, with its 95% interval under ``<key>_interval``."""

    key: str
    title: str
    about: str


def metrics_of(rows: Sequence[Row]) -> list[Metric]:
    k = next((row.k for row in rows if row.k), None)
    return [
        Metric("pass_at_1", "pass@1", "right answers, greedy decoding"),
        Metric("cot_pass_at_1", "CoT-pass@1", "right answers with right steps only, greedy decoding"),
        Metric("maj_at_k", f"maj@{k or 'k'}", f"right majority answer of {k or 'k'} samples"),
        Metric(
            "wrong_step_share_of_correct",
            "Right answers with a wrong step",
            "share of right greedy solutions that hold one wrong step or more; lower is better",
        ),
        Metric(
            "wrong_step_rate_in_correct",
            "Wrong steps in right answers",
            "share of all judged steps of right greedy solutions; lower is better",
        ),
    ]


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into the folder of a finished or unfinished run, and return its path.

    Raises:
        UserError: the folder is not a run, or one of its files does not parse (with file:line).
    """
    target = RunFolder(run_dir).report
    html = render(collect(run_dir))
    with atomic_writer(target) as file:
        file.write(html)
    return target


def render(report: Report) -> str:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {"percent": percent, "interval": interval, "duration": duration, "count": count, "counts": counts}
    environment.filters |= filters
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    katex = (FOLDER / "katex" / "katex.min.js").read_text(encoding="utf-8")
    names = ("charts.js", "formulas.js", "browser.js", "page.js")
    script = "".join((FOLDER / name).read_text(encoding="utf-8") for name in names)
    summary = report.summary
    every_row = [*summary.iterations, *(row for rows in summary.methods.values() for row in rows)]
    return environment.get_template("page.html").render(
        report=report,
        summary=summary,
        finding=finding(summary.iterations),
        metrics=metrics_of(every_row),
        notes=notes(report),
        last_of_methods=last_of_methods(report),
        data_sets=data_sets([row.model_dump(include={"by"}) for row in every_row]),
        # Hashes instead of 'unsafe-inline': text of a model that got past the escaping could still not run.
        policy=(
            f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
            f"script-src '{_hash(katex)}' '{_hash(script)}'"
        ),
        style=Markup(style),
        katex=Markup(katex),
        script=Markup(script),
        data=Markup(embed(payload(report, metrics_of(every_row)))),
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embed(value: Any) -> str:
    """JSON for a script element: without "<" nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").encode("utf-8", "replace").decode()


def payload(report: Report, metrics: Sequence[Metric]) -> dict[str, Any]:
    """What the script draws."""
    methods = {report.method: report.summary.iterations, **report.summary.methods}
    return {
        "metrics": [asdict(metric) for metric in metrics],
        "evaluations": {
            # the page shows neither breakdowns nor estimates for k
            name: [row.model_dump(exclude={"by", "pass_at_k", "cot_pass_at_k"}) for row in rows]
            for name, rows in methods.items()
            if rows
        },
        "warm_up": report.warm_up and asdict(report.warm_up),
        "trainings": {name: [asdict(row) for row in rows] for name, rows in report.trainings.items()},
        "positions": {name: [asdict(row) for row in rows] for name, rows in report.positions.items()},
        "calibration": [asdict(row) for row in report.calibration],
        "browser": report.browser.payload(),
    }


def last_of_methods(report: Report) -> list[tuple[str, Row]]:
    """(method, row) of the common start and of each method's last model; empty without other methods."""
    summary = report.summary
    if not summary.methods or not summary.iterations:
        return []
    ends: Mapping[str, Sequence[Row]] = {report.method: summary.iterations, **summary.methods}
    return [("start", summary.iterations[0]), *((name, rows[-1]) for name, rows in ends.items() if rows)]


def notes(report: Report) -> list[str]:
    found = list(report.warm_up.notes) if report.warm_up else []
    for method, trainings in report.trainings.items():
        prefix = "" if method == report.method else f"{method}, "
        found += [prefix + note for training in trainings for note in training.notes]
    return found


def finding(rows: Sequence[Row]) -> str | None:
    """The result in one sentence: first against last model."""
    if len(rows) < 2:
        return None
    first, last = rows[0], rows[-1]
    parts = [
        f"{name} {_change(a, b)}"
        for name, a, b in (
            ("pass@1", first.pass_at_1, last.pass_at_1),
            (
                "the share of right answers that hold a wrong step",
                first.wrong_step_share_of_correct,
                last.wrong_step_share_of_correct,
            ),
        )
        if a is not None and b is not None
    ]
    if not parts:
        return None
    problems = f", on {count(last.num_problems)} held-out problems" if last.num_problems else ""
    return f"From {first.name} to {last.name}, " + " and ".join(parts) + problems + "."


def _change(before: float, after: float) -> str:
    if percent(before) == percent(after):
        return f"stayed at {percent(after)}"
    return f"{'rose' if after > before else 'fell'} from {percent(before)} to {percent(after)}"


def percent(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.1f}%"


def interval(bounds: Interval | None) -> str:
    return "" if bounds is None else f"{100 * bounds[0]:.1f} – {100 * bounds[1]:.1f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ABSENT
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def count(value: float | int | None) -> str:
    return ABSENT if value is None else f"{value:,.0f}"


def counts(values: Mapping[str, Any]) -> str:
    """Counts as text: ``{"steps": {"right": 5}, "held_out": 2}`` is "steps (right 5), held out 2"."""
    return ", ".join(
        f"{key.replace('_', ' ')} " + (f"({counts(value)})" if isinstance(value, Mapping) else str(value))
        for key, value in values.items()
        if key != "warnings"  # shown at the top of the page
    )

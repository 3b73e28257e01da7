"""The report of ``stepkto judge-eval`` as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def report_table(report: dict[str, Any]) -> str:
    """Markdown: a line per source and judge, over all solutions and inside right answers; comparisons; scores."""
    columns = {
        "error acc.": "error_accuracy", "correct acc.": "correct_accuracy", "F1": "f1", "steps judged": "judged_share",
        "precision of wrong": "precision_of_wrong", "wrong found": "wrong_steps_found",
        "precision of right": "precision_of_right", "right found": "right_steps_found",
    }  # fmt: skip
    rows = [
        [title, row["solutions"], *(_cell(row[key], row[f"{key}_interval"]) for key in columns.values())]
        for title, row in _judges(report)
    ]
    lines = [f"judge: {report['judge']}", "", *_markdown(["source", "solutions", *columns], rows)]
    keys = ("precision_of_wrong", "wrong_steps_found", "judged_share")
    rows = []
    for title, row in _judges(report):
        right = row["right_answers"]
        called = right["steps"]["people_right_judge_wrong"] + right["steps"]["people_wrong_judge_wrong"]
        cells = (_cell(right[key], right[f"{key}_interval"]) for key in keys)
        rows.append([title, right["solutions"], right["with_a_wrong_step"], called, *cells])
    heading = [
        "source", "solutions", "with a wrong step", "called wrong", "precision of wrong", "wrong found", "steps judged",
    ]  # fmt: skip
    lines += ["", "Inside solutions whose final answer is right:", "", *_markdown(heading, rows)]
    lines += [*_comparisons(report), *_scores(report)]
    lines += [
        "",
        '[95% interval]. Where the judge calls no step wrong it predicts "no error" (-1), also where it judged '
        "nothing: read the accuracies beside the share of steps judged.",
    ]
    refused = sum(row["refused"] for row in report["sources"])
    if refused:
        first = next(row["first_refused"][0] for row in report["sources"] if row["refused"])
        lines.append(f"{refused} solutions could not be judged and count as not judged; the first: {first}")
    return "\n".join(lines)


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (heading, ["---"] * len(heading), *rows)]


def _judges(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Title and measures: each source's judge, then its members."""
    found = []
    for row in report["sources"]:
        found.append((row["file"], row))
        found += [(f"{row['file']}: {name}", member) for name, member in row.get("members", {}).items()]
    return found


def _comparisons(report: dict[str, Any]) -> list[str]:
    made = []
    for row in report["sources"]:
        members = row.get("members", {})
        made += [(f"{row['file']}: {name}", member["combination"]) for name, member in members.items()]
        if "against" in row:
            made.append((f"{row['file']}: {row['against']['judge']}", row["against"]))
    if not made:
        return []
    rows = []
    for title, row in made:
        if not row["solutions"]:
            rows.append([title, 0, *["–"] * 6])
            continue
        right = row["right_answers"]
        differences = [row["f1"], right["precision_of_wrong"], right["wrong_steps_found"]]
        cells = [_cell(each["difference"], each["interval"], "+.1f") for each in differences]
        counts = [row["found_only_by_first"], row["found_only_by_second"], f"{row['p_value']:.3g}"]
        rows.append([title, row["solutions"], *counts, *cells])
    heading = [
        "source: other judge", "solutions", "only this names the error", "only the other", "p", "F1",
        "right answers: precision", "right answers: found",
    ]  # fmt: skip
    about = (
        f"{report['judge']} compared with another judge on the same solutions, in percentage points (right answers: "
        "measures of wrong inside them):"
    )
    return ["", about, "", *_markdown(heading, rows)]


def _scores(report: dict[str, Any]) -> list[str]:
    rows = [
        [
            title, f"{part['from']:.1f} to {part['to']:.1f}", part["steps"], f"{part['mean_score']:.3f}",
            _cell(part["right"], part["right_interval"]),
        ]
        for title, row in _judges(report)
        for part in row["reliability"]
    ]  # fmt: skip
    table = _markdown(["source", "score", "steps", "mean score", "right"], rows)
    return ["", "Steps by score:", "", *table] if rows else []


def _cell(value: float | None, interval: Sequence[float] | None, form: str = ".1f") -> str:
    if value is None:
        return "–"
    shown = f"{100 * value:{form}}"
    return shown if interval is None else f"{shown} [{100 * interval[0]:{form}}, {100 * interval[1]:{form}}]"

"""The report of ``stepkto judge-eval`` as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def report_table(report: dict[str, Any]) -> str:
    """Markdown: a line per source and judge, over all solutions and inside right answers; comparisons; scores."""
    lines = [
        f"judge: {report['judge']}",
        "",
        "| source | solutions | error acc. | correct acc. | F1 | steps judged | precision of wrong | wrong found "
        "| precision of right | right found |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    columns = (
        "error_accuracy", "correct_accuracy", "f1", "judged_share", "precision_of_wrong", "wrong_steps_found",
        "precision_of_right", "right_steps_found",
    )  # fmt: skip
    for title, row in _judges(report):
        cells = [_cell(row[key], row[f"{key}_interval"]) for key in columns]
        lines.append(f"| {title} | {row['solutions']} | {' | '.join(cells)} |")
    lines += [
        "",
        "Inside solutions whose final answer is right:",
        "",
        "| source | solutions | with a wrong step | called wrong | precision of wrong | wrong found | steps judged |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for title, row in _judges(report):
        right = row["right_answers"]
        called = right["steps"]["people_right_judge_wrong"] + right["steps"]["people_wrong_judge_wrong"]
        keys = ("precision_of_wrong", "wrong_steps_found", "judged_share")
        cells = [str(right["with_a_wrong_step"]), str(called), *(_cell(right[k], right[f"{k}_interval"]) for k in keys)]
        lines.append(f"| {title} | {right['solutions']} | {' | '.join(cells)} |")
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
    lines = [
        "",
        f"{report['judge']} compared with another judge on the same solutions, in percentage points (right answers: "
        "measures of wrong inside them):",
        "",
        "| source: other judge | solutions | only this names the error | only the other | p | F1 "
        "| right answers: precision | right answers: found |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for title, row in made:
        if not row["solutions"]:
            lines.append(f"| {title} | 0 | – | – | – | – | – | – |")
            continue
        right = row["right_answers"]
        differences = [row["f1"], right["precision_of_wrong"], right["wrong_steps_found"]]
        cells = [_cell(each["difference"], each["interval"], "+.1f") for each in differences]
        counts = f"{row['found_only_by_first']} | {row['found_only_by_second']} | {row['p_value']:.3g}"
        lines.append(f"| {title} | {row['solutions']} | {counts} | {' | '.join(cells)} |")
    return lines


def _scores(report: dict[str, Any]) -> list[str]:
    rows = [(title, part) for title, row in _judges(report) for part in row["reliability"]]
    if not rows:
        return []
    lines = [
        "",
        "Steps by score:",
        "",
        "| source | score | steps | mean score | right |",
        "| --- | --- | --- | --- | --- |",
    ]
    for title, part in rows:
        shown = f"{part['from']:.1f} to {part['to']:.1f} | {part['steps']} | {part['mean_score']:.3f}"
        lines.append(f"| {title} | {shown} | {_cell(part['right'], part['right_interval'])} |")
    return lines


def _cell(value: float | None, interval: Sequence[float] | None, form: str = ".1f") -> str:
    if value is None:
        return "–"
    shown = f"{100 * value:{form}}"
    return shown if interval is None else f"{shown} [{100 * interval[0]:{form}}, {100 * interval[1]:{form}}]"

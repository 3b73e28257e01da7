"""``stepkto compare-evaluations A B``: two models on the same problems."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.table import Table

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import read_json, read_json_if_there
from megatron_stepkto.base.records import read_records
from megatron_stepkto.base.stage import MANIFEST
from megatron_stepkto.evaluation.metrics import ProblemResult
from megatron_stepkto.evaluation.statistics import Interval, bootstrap_interval, mcnemar_exact
from megatron_stepkto.evaluation.table import METRICS, Row, table_text
from megatron_stepkto.recipe.keys import Sampling
from megatron_stepkto.recipe.section import training_only, unkeyed

Pairs = Sequence[tuple[ProblemResult, ProblemResult]]

# Settings that say which model and which problems were measured (the latter are compared one by one), and what only
# `stepkto measure` records: the seed, which is always the same, and keys that no evaluation follows.
_NOT_COMPARED = {"name", "evaluate.num_problems", "evaluate.split", "seed"} | {
    f"sample.{name}" for name in training_only(Sampling) | unkeyed(Sampling)
}
_ITSELF = {"sha256": "the measured model"}


class _Key(BaseModel):
    settings: dict[str, Any]
    inputs: dict[str, dict[str, Any]]


class _Manifest(BaseModel):
    """The part of an evaluation's manifest.json that is read."""

    key: _Key


@dataclass(frozen=True)
class Difference:
    """Second minus first, as fractions of 1, with a 95% bootstrap interval over problems.

    ``only_first``, ``only_second``: the number of problems that only this model solves; ``p_value``: McNemar's exact
    test. All three are None for a metric that is not a yes or no per problem.
    """

    metric: str
    first: float | None
    second: float | None
    difference: float | None
    interval: Interval | None
    only_first: int | None = None
    only_second: int | None = None
    p_value: float | None = None


def compare_evaluations(first: Path, second: Path) -> dict[str, Any]:
    """Compare two evaluation folders: a run's (``runs/NAME/evaluate/M1``), or the output of ``stepkto measure``.

    ``settings``: those that differ between the two evaluations; None where one has no manifest. ``by``: the same
    comparison of each data set, where the evaluations are of several.

    Raises:
        UserError: a folder is not a finished evaluation, or the two are of different problems.
    """
    # `stepkto measure --output DIR` writes the problems and the results side by side
    first, second = (folder / "results" if (folder / "results").is_dir() else folder for folder in (first, second))
    rows = [_row(folder) for folder in (first, second)]
    results = [list(read_records(folder / "problems.jsonl", ProblemResult)) for folder in (first, second)]
    pairs = _paired((first, second), results)
    sets: dict[str, list[tuple[ProblemResult, ProblemResult]]] = {}
    for pair in pairs:
        if (name := pair[1].data or pair[0].data) is not None:
            sets.setdefault(name, []).append(pair)
    return {
        "first": {"folder": str(first), "name": rows[0]["name"]},
        "second": {"folder": str(second), "name": rows[1]["name"]},
        "settings": _other_settings(first, second, rows),
        **_compared(pairs, rows),
        "by": {"data": {name: _compared(sets[name], rows) for name in sorted(sets)}} if len(sets) > 1 else {},
    }


def _paired(
    folders: tuple[Path, Path], results: Sequence[Sequence[ProblemResult]]
) -> list[tuple[ProblemResult, ProblemResult]]:
    """The results of each problem, by its text and answer; by its id where a text is there several times.

    A problem of one file has another id in a run, and in an evaluation of several files, than alone.
    """
    texts, ids = (
        [{str(getattr(result, key)): result for result in each} for each in results]
        for key in ("problem_sha256", "problem_id")
    )
    if texts[0].keys() == texts[1].keys() and len(texts[0]) == len(results[0]) == len(results[1]):
        return [(texts[0][key], result) for key, result in texts[1].items()]
    named = " and ".join(map(str, folders))
    missing = sorted(ids[0].keys() ^ ids[1].keys())
    if missing:
        raise UserError(
            f"{named} are of different problems: {len(missing)} are in one only, such as "
            f"{', '.join(missing[:5])}; evaluate both on the same data"
        )
    pairs = [(ids[0][key], result) for key, result in ids[1].items()]
    changed = [one.problem_id for one, other in pairs if one.problem_sha256 != other.problem_sha256]
    if changed:
        raise UserError(
            f"{named}: problem {changed[0]} (and {len(changed) - 1} more) differs in text or answer "
            "between them; evaluate both on the same data"
        )
    return pairs


def _compared(pairs: Pairs, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    differences = [_yes_or_no("pass@1", pairs, lambda r: r.greedy == 1)]
    if all(row.get("cot_pass_at_1") is not None for row in rows):
        throughout = "right answer, right steps"
        differences.append(_yes_or_no(throughout, pairs, lambda r: r.right_and_judged == 1 and r.flawed == 0))
    if rows[0]["k"] == rows[1]["k"]:
        differences.append(_yes_or_no(f"maj@{rows[0]['k']}", pairs, lambda r: r.majority))
    differences += [
        _ratio("accuracy of samples", pairs, lambda r: (r.right, r.samples)),
        _ratio("right with a wrong step", pairs, lambda r: (r.flawed, r.right_and_judged)),
        _ratio("wrong steps in right", pairs, lambda r: (r.wrong_steps, r.judged_steps)),
    ]
    return {"num_problems": len(pairs), "differences": [vars(difference) for difference in differences]}


def _row(folder: Path) -> dict[str, Any]:
    for name in (METRICS, "problems.jsonl"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: expected a finished evaluation, {name} is missing; run `stepkto evaluate` (a "
                "run's model) or `stepkto measure` (any other)"
            )
    return dict(read_json(folder / METRICS, Row))


def _other_settings(first: Path, second: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    one, other = _settings(first), _settings(second)
    if one is None or other is None:
        return None
    if all(row.get("dtype") for row in rows):  # sample.dtype: auto may stand for two
        one["sample.dtype"], other["sample.dtype"] = (row["dtype"] for row in rows)
    return [
        {"setting": name, "first": one.get(name), "second": other.get(name)}
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)  # keys at their default may be absent
    ]


def _settings(folder: Path) -> dict[str, Any] | None:
    manifest = read_json_if_there(folder / MANIFEST, _Manifest)
    if manifest is None:
        return None
    key = manifest["key"]
    found = dict(_flat(key["settings"], key["inputs"].get("model", {}).get("sha256")))
    return {name: value for name, value in found.items() if name not in _NOT_COMPARED}


def _flat(settings: dict[str, Any], model: str | None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value). A judge that works with the measured model, which differs, is the same setting for both."""
    for name, value in settings.items():
        if isinstance(value, dict):
            inner = _ITSELF if model is not None and value == {"sha256": model} else value
            yield from _flat(inner, model, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _yes_or_no(metric: str, pairs: Pairs, solved: Callable[[ProblemResult], bool]) -> Difference:
    one = np.array([solved(a) for a, _ in pairs], dtype=np.float64)
    other = np.array([solved(b) for _, b in pairs], dtype=np.float64)
    gain = other - one
    only_first, only_second = int((gain < 0).sum()), int((gain > 0).sum())
    return Difference(
        metric, float(one.mean()), float(other.mean()), float(gain.mean()),
        bootstrap_interval(lambda drawn: float(gain[drawn].mean()), len(pairs)),
        only_first, only_second, mcnemar_exact(only_first, only_second),
    )  # fmt: skip


def _ratio(metric: str, pairs: Pairs, counts: Callable[[ProblemResult], tuple[int, int]]) -> Difference:
    """A ratio of sums over problems: each model's own right answers are its denominators."""
    table = np.array([(*counts(a), *counts(b)) for a, b in pairs], dtype=np.float64)

    def shares(drawn: np.ndarray[Any, Any]) -> tuple[float | None, float | None]:
        hits, trials, other_hits, other_trials = table[drawn].sum(axis=0)
        return (hits / trials if trials else None), (other_hits / other_trials if other_trials else None)

    def difference(drawn: np.ndarray[Any, Any]) -> float | None:
        one, other = shares(drawn)
        return None if one is None or other is None else float(other - one)

    every = np.arange(len(pairs))
    one, other = shares(every)
    return Difference(metric, one, other, difference(every), bootstrap_interval(difference, len(pairs)))


def comparison_table(comparison: dict[str, Any]) -> str:
    """As it is printed: all problems, then each data set, where there are several."""
    table = Table(box=SIMPLE_HEAD, caption="second - first, [95% bootstrap over problems]; p: McNemar, exact")
    first, second = _headings(comparison["first"], comparison["second"])
    for heading in (f"{comparison['num_problems']:,} problems", first, second, "difference", "only one solves", "p"):
        table.add_column(heading, justify="left" if heading.endswith("problems") else "right", overflow="fold")
    _add_rows(table, comparison["differences"])
    for name, part in comparison["by"].get("data", {}).items():
        table.add_section()
        table.add_row(f"{name}: {part['num_problems']:,} problems")
        _add_rows(table, part["differences"])
    return "\n".join([table_text(table), *_notes(comparison)])


def _add_rows(table: Table, differences: Sequence[Mapping[str, Any]]) -> None:
    for row in differences:
        change = "–"
        if row["difference"] is not None and row["interval"] is not None:
            low, high = row["interval"]
            change = f"{100 * row['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        shares = ("–" if row[key] is None else f"{100 * row[key]:.1f}%" for key in ("first", "second"))
        paired = row["p_value"] is not None
        solved = f"{row['only_first']} | {row['only_second']}" if paired else ""
        table.add_row(row["metric"], *shares, change, solved, f"{row['p_value']:.3g}" if paired else "")


def _headings(first: dict[str, str], second: dict[str, str]) -> tuple[str, str]:
    """The models' names; of models with one name their folders, from where these differ."""
    if first["name"] != second["name"]:
        return first["name"], second["name"]
    one, other = (Path(os.path.abspath(side["folder"])) for side in (first, second))
    if one == other:
        return first["name"], second["name"]
    if one.name == other.name == "results":
        one, other = one.parent, other.parent
    common = Path(os.path.commonpath([one, other]))
    heading, other_heading = (str(each.relative_to(common)) if each != common else each.name for each in (one, other))
    return heading, other_heading


def _notes(comparison: dict[str, Any]) -> Iterator[str]:
    settings = comparison["settings"]
    if settings is None:
        yield f"whether both were made with the same settings is not known: one has no {MANIFEST}"
    elif settings:
        yield "the evaluations were made with different settings, which may be why they differ:"
        for row in settings:
            yield f"  {row['setting']}: {row['first']!r:.80} | {row['second']!r:.80}"

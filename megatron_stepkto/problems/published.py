"""Problems as their publishers ship them: read, given ids, freed of duplicates, with every bad row set aside.

Layouts are those of ``to_problem``: GSM8K, MATH, NuminaMath, MATH-500 and others; files are JSON lines, JSON,
parquet and folders of them (base/tables.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import stable_hash
from megatron_stepkto.base.records import Problem, parse_rows, rejected
from megatron_stepkto.problems.datasets import to_problem
from megatron_stepkto.problems.imported.solution import problem_id_of, same_answer
from megatron_stepkto.problems.overlap import Text, find_overlaps
from megatron_stepkto.recipe.prompts import ProblemCheck

SHOWN = 3  # bad rows in an error


@dataclass
class Published:
    """Problems with unique ids and unique texts, in the order of the files.

    rejected: bad rows, {"file", "line", "error", "row"} as in a quarantine. repeated: file:line of the rows whose text
    an earlier row has, with the same answer. renamed: ids were not unique, so all were replaced by hashes.
    """

    problems: list[Problem] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    renamed: bool = False


@dataclass(frozen=True)
class _Row:
    where: Path
    line: int
    raw: bytes
    problem: Problem


def read_published(paths: Sequence[Path], check: ProblemCheck, report: Callable[[int], None]) -> Published:
    """All problems of the files together.

    Several rows of one text are one problem. Where their answers are different numbers, all of them are rejected: one
    of the answers would give wrong labels.

    Args:
        check: raises ValueError for a problem to refuse. report: called with the number of rows read so far.

    Raises:
        UserError: a file is missing or does not read at all, or no row is good; names the first bad ones.
    """
    found = Published()
    by_text: dict[str, list[_Row]] = {}
    read = 0
    for path in paths:
        for line, raw, row in parse_rows(path, lambda row: check(to_problem(row))):
            read += 1
            report(read)
            if isinstance(row, ValueError):
                found.rejected.append(rejected(path, line, raw, row))
            else:
                by_text.setdefault(problem_id_of(row.problem), []).append(_Row(path, line, raw, row))
    for first, *others in by_text.values():
        other = next((row for row in others if same_answer(row.problem.answer, first.problem.answer) == 0), None)
        if other is None:
            found.problems.append(first.problem)
            found.repeated += [f"{row.where}:{row.line}" for row in others]
            continue
        reason = (
            f"one text with two answers, {first.problem.answer} ({first.where}:{first.line}) and "
            f"{other.problem.answer} ({other.where}:{other.line}); keep the right one"
        )
        found.rejected += [rejected(row.where, row.line, row.raw, reason) for row in (first, *others)]
    if not found.problems:
        shown = "; ".join(f"{row['file']}:{row['line']}: {row['error']}" for row in found.rejected[:SHOWN])
        named = ", ".join(str(path) for path in paths[:SHOWN])
        raise UserError(
            f"{named}: expected problems with answers, got {len(found.rejected)} rows that cannot be used: {shown}"
            if found.rejected
            else f"{named}: expected problems with answers, found no row"
        )
    ids = {problem.problem_id for problem in found.problems}
    if len(ids) < len(found.problems):
        found.renamed = True
        found.problems = [
            problem.model_copy(update={"problem_id": problem_id_of(problem.problem)}) for problem in found.problems
        ]
    return found


def without(problems: Sequence[Problem], held_out: Sequence[Problem]) -> list[Problem]:
    """The problems whose texts, white space and case aside, are not held out: a run refuses those (overlap.py)."""

    def texts(of: Sequence[Problem]) -> list[Text]:
        return [Text("", str(number), problem.problem) for number, problem in enumerate(of)]

    shared = {
        int(overlap.train.problem_id) for overlap in find_overlaps(texts(problems), texts(held_out), ngrams=False)
    }
    return [problem for number, problem in enumerate(problems) if number not in shared]


def hold_out(problems: Sequence[Problem], count: int) -> tuple[list[Problem], list[Problem]]:
    """(the others, ``count`` problems), chosen by the hash of their texts: the same ones whatever the order."""
    chosen = sorted(problems, key=lambda problem: stable_hash("held out", problem_id_of(problem.problem)))[:count]
    ids = {problem.problem_id for problem in chosen}
    return [problem for problem in problems if problem.problem_id not in ids], chosen

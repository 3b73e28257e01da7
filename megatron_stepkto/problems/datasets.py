"""Problems of the usual benchmarks, from local files or, where the user asks, from the Hugging Face hub."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_stepkto.answers.final_answer import extract_answer
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import describe
from megatron_stepkto.base.records import Problem, read_rows
from megatron_stepkto.base.tables import SUFFIXES
from megatron_stepkto.problems.distinct import check_distinct
from megatron_stepkto.recipe.prompts import ProblemCheck

Parse = Callable[[dict[str, Any]], Problem]

HUB = "hub:"
DATA = "data"  # key of a problem that is measured: the name of its data set, where there are several
# short names after "hub:" -> repository, configuration, split
KNOWN = {
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("math-ai/aime25", None, "test"),
    "amc23": ("math-ai/amc23", None, "test"),
    "hmmt25": ("MathArena/hmmt_feb_2025", None, "train"),
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),  # text only, English, with final answers
}
_PROBLEM_KEYS = ("problem", "question", "Problem", "prompt")
_ANSWER_KEYS = ("answer", "final_answer", "expected_answer", "Answer")
_ID_KEYS = ("problem_id", "unique_id", "id", "ID", "problem_idx")
_SUBJECT_KEYS = ("subject", "type", "subfield", "problem_type")
_NO_ANSWER = {"proof", "notfound"}  # what NuminaMath 1.5 writes for one


def to_problem(row: dict[str, Any]) -> Problem:
    """Convert a row of a common layout: MATH-500's, GSM8K's (``question``, ``answer`` with ####), AMC's floats,
    OlympiadBench's list ``final_answer``, MATH's and NuminaMath's (the answer is the last box of ``solution``).

    Without an id, one is derived from the problem's text. Without an answer the solution must state one.

    Raises:
        ValueError: the problem or its answer is missing.
    """
    text = next((row[key] for key in _PROBLEM_KEYS if row.get(key)), None)
    if not isinstance(text, str):
        raise ValueError(f"expected the problem under {', '.join(_PROBLEM_KEYS)}, got keys {', '.join(row)}")
    solution, answer = row.get("solution"), next((row[key] for key in _ANSWER_KEYS if row.get(key) is not None), None)
    if answer is row.get("final_answer") and isinstance(answer, list) and all(isinstance(each, str) for each in answer):
        answer = ", ".join(answer)  # OlympiadBench's
    if isinstance(answer, str) and "####" in answer:
        solution, answer = answer, extract_answer(answer)
    if answer is None and isinstance(solution, str):
        answer = extract_answer(solution)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
        raise ValueError(f"expected the answer as a text or a number, got {answer!r:.60}")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError(f"expected the answer as a text or a finite number, got {answer}")
    if "problem_type" in row and answer in _NO_ANSWER:
        raise ValueError(f"has no final answer to check (answer: {answer})")
    if answer is None or str(answer).strip() == "":
        raise ValueError(f"expected the answer under {', '.join(_ANSWER_KEYS)} or in the solution, found none")
    known = next((row[key] for key in _ID_KEYS if row.get(key) is not None), None)
    number = str(known) if known is not None else hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]
    subject = next((row[key] for key in _SUBJECT_KEYS if isinstance(row.get(key), str)), None)
    kept = {key: value for key, value in (("subject", subject), ("level", row.get("level"))) if value is not None}
    return Problem(
        problem_id=number, problem=text, answer=str(answer), solution=solution if isinstance(solution, str) else None,
        **kept,
    )  # fmt: skip


def as_problem(row: dict[str, Any]) -> Problem:
    """A Problem record as it is, with all its keys; any other row by ``to_problem``.

    Raises:
        ValueError: the problem or its answer is missing.
    """
    return Problem.model_validate(row) if {"problem_id", "problem"} <= row.keys() else to_problem(row)


def load_problems(
    source: str, *, quarantine: Path | None = None, limit: int | None = None, check: ProblemCheck | None = None
) -> list[Problem]:
    """The problems of a data set: a file or folder that ``read_rows`` reads, or ``hub:NAME``.

    ``hub:`` takes a name of ``KNOWN`` or REPOSITORY[:CONFIGURATION[:SPLIT]], and is the only
    form that downloads.

    Args:
        limit: read only the first ``limit`` problems.
        check: raises ValueError for a problem to refuse; its row counts as bad.

    Raises:
        UserError: the file is missing, a row has an unknown layout (file:line), two problems share an id, or there are
            fewer than ``limit``.
    """

    def parse(row: dict[str, Any]) -> Problem:
        return check(to_problem(row)) if check else to_problem(row)

    problems = list(_hub(source, parse) if source.startswith(HUB) else _local(source, quarantine, parse))
    if limit is not None and limit > len(problems):
        raise UserError(
            f"{source}: --limit (evaluate.num_problems) is {limit}, the data set has {len(problems)} problems; lower it"
        )
    problems = problems[:limit]
    check_distinct(problems, source, train=False)
    return problems


def _local(source: str, quarantine: Path | None, parse: Parse) -> Iterator[Problem]:
    path = Path(source)
    if not path.exists():
        hint = f"; to download it, write {HUB}{source}" if source in KNOWN or source.count("/") == 1 else ""
        raise UserError(f"{source}: expected a file of problems (JSON lines, parquet, csv), found none{hint}")
    if path.is_file() and path.suffix not in SUFFIXES:
        raise UserError(f"{path}: expected {', '.join(SUFFIXES)} or a folder of datasets.save_to_disk")
    return read_rows(path, parse, quarantine=quarantine)


def _hub(source: str, parse: Parse) -> Iterator[Problem]:
    import datasets

    name = source.removeprefix(HUB)
    repository, configuration, split = KNOWN.get(name) or (*name.split(":"), None, None)[:3]
    assert repository is not None
    try:
        found = datasets.load_dataset(repository, configuration, split=split or "test")
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    for number, row in enumerate(found, 1):
        try:
            yield parse(row)
        except UserError:  # not about this row alone
            raise
        except ValueError as error:
            reason = describe(error) if isinstance(error, ValidationError) else error
            raise UserError(f"{source}: row {number}: {reason}") from None


def set_names(sources: Sequence[str], key: str) -> list[str]:
    """Names of data sets in tables and ids: the file's without its suffix, the folder's, or the one after ``hub:``.

    Raises:
        UserError: two have the same; begins with ``key``, by which they were given.
    """
    names = [_name(source) for source in sources]
    twice = max(names, key=names.count, default="")
    alike = [source for source, name in zip(sources, names, strict=True) if name == twice]
    if len(set(alike)) < len(alike):
        raise UserError(f"{key}: {alike[0]} is given twice; name it once")
    if len(alike) > 1:
        raise UserError(f"{key}: {' and '.join(alike)} would both be {twice} in tables and ids; rename one")
    return names


def of_set(name: str, problem: Problem) -> Problem:
    """A problem of one of several data sets that are measured together: in metrics, ``by`` tells them apart."""
    return problem.model_copy(update={"problem_id": f"{name}/{problem.problem_id}", DATA: name})


def _name(source: str) -> str:
    if source.startswith(HUB):
        return source.removeprefix(HUB).split(":")[0].split("/")[-1]
    path = Path(os.path.abspath(source))  # the name of ``.``, too
    return path.name if path.is_dir() else path.stem

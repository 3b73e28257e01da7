"""Problems of a split, from the built-in generator or from files."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import stable_hash
from megatron_stepkto.base.records import Problem, bad_row, parse_rows, read_rows, write_records
from megatron_stepkto.problems import overlap as contamination
from megatron_stepkto.problems.chained_arithmetic.generate import Split, generate
from megatron_stepkto.problems.datasets import DATA, as_problem, of_set, set_names
from megatron_stepkto.problems.distinct import check_distinct
from megatron_stepkto.problems.imported.formats import importer_of
from megatron_stepkto.problems.overlap import check_apart
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.prompts import ProblemCheck

_File = tuple[Path, Callable[[dict[str, Any]], Iterable[Any]]]  # and how a row is parsed into problems


def write_problems(
    source: recipe.Problems,
    split: Split,
    count: int | None,
    seed: int,
    iteration: int,
    output: Path,
    quarantine: Path | None = None,
    check: ProblemCheck | None = None,
) -> dict[str, Any]:
    """Write ``count`` problems (None: all) of a split; iteration t gets other train problems than t - 1.

    Args:
        check: raises ValueError for a problem to refuse; its row counts as bad.

    Returns:
        {"problems": number written, and the counts of ``check_distinct`` for the whole file}.

    Raises:
        UserError: a row is bad, a problem_id is duplicated, one text to train on has two answers, a file has too few
            problems, or two evaluation sets have one name.
    """
    if source.source == "chained_arithmetic":
        assert count is not None
        problems = generate(split, count, stable_hash(seed, split, iteration) % 2**31)
        return {"problems": write_records(output, problems)}

    def parse(row: dict[str, Any]) -> Problem:
        if split != "train":
            row = {key: value for key, value in row.items() if key != DATA}
        return check(as_problem(row)) if check else as_problem(row)

    def read(path: Path) -> list[Problem]:
        return list(read_rows(path, parse, quarantine=quarantine))

    if split == "train":
        assert source.train is not None
        problems = read(source.train)
        counts = check_distinct(problems, str(source.train), train=True)
        return {"problems": write_records(output, take_turns(problems, count, seed, iteration)), **counts}
    paths = getattr(source, split)
    names = set_names([str(path) for path in paths], f"problems.{split}")
    problems, repeated = [], 0
    for path, name in zip(paths, names, strict=True):
        found = read(path)
        if count is not None and count > len(found):
            raise UserError(f"{path}: evaluate.num_problems is {count}, the file holds {len(found)}; lower it")
        repeated += check_distinct(found, str(path), train=False).get("repeated_texts", 0)
        problems += found[:count] if len(paths) == 1 else [of_set(name, problem) for problem in found[:count]]
    return {"problems": write_records(output, problems), **({"repeated_texts": repeated} if repeated else {})}


def take_turns(problems: list[Problem], count: int | None, seed: int, iteration: int) -> list[Problem]:
    """The slice that iteration t (from 1) works on: disjoint slices of a shuffle, then of another shuffle."""
    if count is not None and count > len(problems):
        raise UserError(f"problems.per_iteration is {count}, the train file holds {len(problems)} problems; lower it")
    count = count or len(problems)
    cycle, place = divmod(iteration - 1, len(problems) // count)
    order = list(problems)
    random.Random(stable_hash(seed, "problems", cycle)).shuffle(order)
    return order[place * count : (place + 1) * count]


def check_training_problems(source: recipe.Problems, *, allow: bool, skip_bad: bool) -> dict[str, object]:
    """Refuse training problems that are also in the recipe's dev or test file or in ``apart_from``.

    Args:
        allow: do not refuse; return what the manifest records.
        skip_bad: skip rows that cannot be parsed; the stage that reads them later quarantines them.

    Raises:
        UserError: there are overlaps (lists them with file:line and id on both sides), or a file cannot be read.
    """
    if source.source == "chained_arithmetic":
        return {}
    files: list[_File] = (
        [(item.path, _imported(item.format)) for item in source.imports]
        if source.source == "imports"
        else [(source.train, _one_problem)]  # type: ignore[list-item]
    )
    return _check_apart(source, files, allow=allow, skip_bad=skip_bad)


def check_solutions_apart(
    source: recipe.Problems, files: Sequence[Path], *, allow: bool, skip_bad: bool
) -> dict[str, object]:
    """``check_training_problems`` for files of solutions that the warm-up trains on."""
    return _check_apart(source, [(path, _one_problem) for path in files], allow=allow, skip_bad=skip_bad)


def evaluation_sets(source: recipe.Problems, settings: dict[str, Any]) -> dict[str, Path]:
    """What training problems are compared with, as inputs of the stage that reads them.

    Adds problems.overlap to ``settings`` where it is not the default.
    """
    if source.overlap != "exact":
        settings["overlap"] = source.overlap
    files = split_inputs(source, "dev") | split_inputs(source, "test")
    return files | {f"apart_from-{number}": path for number, path in enumerate(source.apart_from)}


def split_inputs(source: recipe.Problems, split: Literal["dev", "test"]) -> dict[str, Path]:
    """The files of an evaluation split, as inputs of the stage that reads them."""
    paths = source.dev if split == "dev" else source.test
    return {split if len(paths) == 1 else f"{split}-{number}": path for number, path in enumerate(paths)}


def _check_apart(source: recipe.Problems, files: list[_File], *, allow: bool, skip_bad: bool) -> dict[str, object]:
    sets = [*source.dev, *source.test, *source.apart_from]
    if not sets:
        return {}
    held_out = [text for path in sets for text in _texts(path, _one_problem, skip_bad=skip_bad)]
    train = [text for path, parse in files for text in _texts(path, parse, skip_bad=skip_bad)]
    return check_apart(train, held_out, ngrams=source.overlap == "13gram", allow=allow)


def _one_problem(row: dict[str, Any]) -> Iterable[Any]:
    return [as_problem(row)]


def _imported(name: str) -> Callable[[dict[str, Any]], Iterable[Any]]:
    importer = importer_of(name)
    return lambda row: {solution.problem_id: solution for solution in importer(row).solutions}.values()


def _texts(
    path: Path, parse: Callable[[dict[str, Any]], Iterable[Any]], *, skip_bad: bool
) -> Iterator[contamination.Text]:
    """The problems of a file of JSON lines, each text once, with its line."""
    seen: set[str] = set()
    for number, _, found in parse_rows(path, lambda row: list(parse(row))):
        if isinstance(found, ValueError):
            if not skip_bad:
                raise bad_row(path, number, found)
            continue
        for item in found:
            if item.problem not in seen:
                seen.add(item.problem)
                yield contamination.Text(f"{path}:{number}", item.problem_id, item.problem)

"""Problems of a split, from the built-in generator or from files."""

from __future__ import annotations

import random
from pathlib import Path

from megatron_stepkto import recipe
from megatron_stepkto.chained_arithmetic.problems import Split, generate
from megatron_stepkto.errors import UserError
from megatron_stepkto.files import stable_hash
from megatron_stepkto.records import Problem, read_records, write_records


def write_problems(
    source: recipe.Problems,
    split: Split,
    count: int | None,
    seed: int,
    iteration: int,
    output: Path,
    quarantine: Path | None = None,
) -> int:
    """Write ``count`` problems (None: all) of a split; iteration t gets other train problems than t - 1.

    Raises:
        UserError: a problem_id or, across splits, a problem stands twice, or a file has too few problems.
    """
    if source.source == "chained_arithmetic":
        assert count is not None
        problems = generate(split, count, stable_hash(seed, split, iteration) % 2**31)
        return write_records(output, problems)
    path = getattr(source, split)
    problems = list(read_records(path, Problem, quarantine=quarantine))
    _check_unique(problems, path)
    if split == "train":
        _check_apart(problems, source, quarantine)
        return write_records(output, take_turns(problems, count, seed, iteration))
    if count is not None and count > len(problems):
        raise UserError(f"{path}: evaluate.num_problems is {count}, the file holds {len(problems)}; lower it")
    return write_records(output, problems[:count])


def take_turns(problems: list[Problem], count: int | None, seed: int, iteration: int) -> list[Problem]:
    """The slice that iteration t (from 1) works on: disjoint slices of a shuffle, then of another shuffle."""
    if count is not None and count > len(problems):
        raise UserError(f"problems.per_iteration is {count}, the train file holds {len(problems)} problems; lower it")
    count = count or len(problems)
    cycle, place = divmod(iteration - 1, len(problems) // count)
    order = list(problems)
    random.Random(stable_hash(seed, "problems", cycle)).shuffle(order)
    return order[place * count : (place + 1) * count]


def _check_unique(problems: list[Problem], path: Path) -> None:
    seen: set[str] = set()
    for problem in problems:
        if problem.problem_id in seen:
            raise UserError(f"{path}: problem_id {problem.problem_id} stands twice; ids must be unique")
        seen.add(problem.problem_id)


def _check_apart(train: list[Problem], source: recipe.Problems, quarantine: Path | None) -> None:
    """No problem that measures may train."""
    texts = {" ".join(problem.problem.split()): problem.problem_id for problem in train}
    for split in ("dev", "test"):
        path = getattr(source, split)
        shared = [
            texts[text]
            for p in (read_records(path, Problem, quarantine=quarantine) if path else ())
            if (text := " ".join(p.problem.split())) in texts
        ]
        if shared:
            raise UserError(
                f"{source.train}: {len(shared)} problems also stand in {path}, so its scores would be worth "
                f"nothing; remove them from one side: {', '.join(shared[:10])}"
            )

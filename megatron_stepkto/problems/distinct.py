"""Are the problems of one file distinct? Ids must be; a duplicated text only brings a warning, and counts again."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.progress import warn
from megatron_stepkto.base.records import Problem
from megatron_stepkto.problems.imported.solution import problem_id_of, same_answer

SHOWN = 5  # groups of ids in a message


def check_distinct(problems: Sequence[Problem], source: str, *, train: bool) -> dict[str, int]:
    """Warn of problems with the same text, white space aside: each counts, in training and in every rate.

    Returns:
        {}, or {"repeated_texts": problems whose text an earlier one has}, for the manifest.

    Raises:
        UserError: a problem_id is duplicated. With ``train`` also: one text has answers that are different numbers,
            one of which would give wrong labels.
    """
    seen: set[str] = set()
    by_text: dict[str, list[Problem]] = {}
    for problem in problems:
        if problem.problem_id in seen:
            raise UserError(
                f"{source}: problem_id {problem.problem_id} is duplicated; ids must be unique (a row without an id has "
                "the hash of its text: remove the row that repeats one)"
            )
        seen.add(problem.problem_id)
        by_text.setdefault(problem_id_of(problem.problem), []).append(problem)
    groups = [group for group in by_text.values() if len(group) > 1]
    if not groups:
        return {}
    conflicts = [group for group in groups if any(same_answer(p.answer, group[0].answer) == 0 for p in group)]
    if conflicts:
        shown = "; ".join(
            ", ".join(f"{p.problem_id} (answer {p.answer})" for p in group[:SHOWN]) for group in conflicts[:SHOWN]
        )
        message = (
            f"{source}: expected one answer per problem text, got {len(conflicts)} texts with several answers: {shown}"
        )
        if train:
            raise UserError(f"{message}; remove the wrong ones")
        warn(message)
    repeated = sum(len(group) - 1 for group in groups)
    shown = "; ".join(", ".join(p.problem_id for p in group[:SHOWN]) for group in groups[:SHOWN])
    warn(
        f"{source}: {repeated} problems repeat the text of an earlier one, and each counts: {shown}"
        f"{'; ...' if len(groups) > SHOWN else ''}"
    )
    return {"repeated_texts": repeated}

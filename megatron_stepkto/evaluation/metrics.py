"""How good a model is: one row of numbers from judged samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import JudgedSample, Label, Problem, Record
from megatron_stepkto.evaluation.majority import Same, majority_is_right
from megatron_stepkto.evaluation.statistics import bootstrap_mean, clustered_share, pass_at_k, plain_share
from megatron_stepkto.problems.datasets import DATA

GROUPS = (DATA, "subject", "level")  # keys of a problem by which an evaluation is also counted


class ProblemResult(Record):
    """One problem of an evaluation: what a paired comparison needs. Step counts are of the greedy solution if right."""

    problem_id: str
    data: str | None = Field(None, description="the data set, where several are measured together")
    problem_sha256: str = Field(description="of the problem's text and answer")
    greedy: Label
    samples: int
    right: int
    majority: bool
    flawed: int
    right_and_judged: int
    wrong_steps: int
    judged_steps: int


def problem_results(
    problems: Sequence[Problem], greedy: Sequence[JudgedSample], sampled: Sequence[JudgedSample], same: Same
) -> list[ProblemResult]:
    """One row per problem, in order."""
    ids = [problem.problem_id for problem in problems]
    first, drawn = _by_problem(ids, greedy, "greedy"), _by_problem(ids, sampled, "sampled")
    results = []
    for problem in problems:
        solution, group = first[problem.problem_id][0], drawn[problem.problem_id]
        wrong, judged = _steps(solution) if solution.outcome == 1 else (0, 0)
        text = f"{problem.problem}\0{problem.answer}"
        results.append(
            ProblemResult(
                problem_id=problem.problem_id,
                data=(problem.model_extra or {}).get(DATA),
                problem_sha256=hashlib.sha256(text.encode()).hexdigest(),
                greedy=solution.outcome,
                samples=len(group),
                right=sum(sample.outcome == 1 for sample in group),
                majority=majority_is_right(group, same),
                flawed=int(wrong > 0),
                right_and_judged=int(judged > 0),
                wrong_steps=wrong,
                judged_steps=judged,
            )
        )
    return results


def evaluation_row(
    name: str,
    split: str,
    problems: Sequence[Problem],
    greedy: Sequence[JudgedSample],
    sampled: Sequence[JudgedSample],
    same: Same = lambda one, other: one == other,
) -> dict[str, Any]:
    """Metrics of one model: one greedy solution and k sampled ones per problem.

    pass@1 and the step errors are those of the greedy solutions; those of the sampled ones are under
    "sampled", with intervals over problems, because the k solutions of a problem are alike. Undecided
    answers count as not right in pass@1 and accuracy. "pass_at_k" holds the unbiased estimate of each power of two
    up to k, from the samples. "cot_pass_at_1" and "cot_pass_at_k" are the same where a solution counts only if its
    answer is right, a step of it is judged and none is wrong (CoT-Pass@K of arXiv 2506.14245); null where no step is
    judged. Where problems carry a key of ``GROUPS``, "by" holds such a row for each of its values.

    Raises:
        UserError: a problem does not have one greedy and k >= 1 sampled solutions.
    """
    ids = [problem.problem_id for problem in problems]
    first = _by_problem(ids, greedy, "greedy")
    drawn = _by_problem(ids, sampled, "sampled")
    sizes = {len(group) for group in drawn.values()}
    if {len(group) for group in first.values()} != {1} or len(sizes) != 1 or 0 in sizes:
        raise UserError(
            f"{name}: expected one greedy solution and the same number of sampled ones for each of {len(ids)} "
            f"problems, got {len(greedy)} and {len(sampled)}; delete the evaluation's folder (--force)"
        )
    row = {"name": name, "split": split, "k": sizes.pop(), **_measure(ids, first, drawn, same)}
    by = {
        key: {value: _measure(members, first, drawn, same) for value, members in groups.items()}
        for key in GROUPS
        if (groups := _groups(problems, key))
    }
    return {**row, "by": by} if by else row


def _groups(problems: Sequence[Problem], key: str) -> dict[str, list[str]]:
    """Ids of problems by the value of one of their keys; problems without the key are left out."""
    groups: dict[str, list[str]] = {}
    for problem in problems:
        if (value := (problem.model_extra or {}).get(key)) is not None:
            groups.setdefault(str(value), []).append(problem.problem_id)
    return dict(sorted(groups.items()))


def _measure(
    ids: Sequence[str], first: Mapping[str, list[JudgedSample]], drawn: Mapping[str, list[JudgedSample]], same: Same
) -> dict[str, Any]:
    greedy, groups = [first[number][0] for number in ids], [drawn[number] for number in ids]
    right = [sum(sample.outcome == 1 for sample in group) for group in groups]
    k = len(groups[0])
    cot = [_is_right_throughout(row) for row in greedy] if any(_steps(row)[1] for row in greedy) else []
    return {
        "num_problems": len(ids),
        **plain_share(row.outcome == 1 for row in greedy).named("pass_at_1"),
        **plain_share(cot).named("cot_pass_at_1"),
        **plain_share(majority_is_right(group, same) for group in groups).named("maj_at_k"),
        "pass_at_k": _estimates(right, k),
        "cot_pass_at_k": (
            _estimates([sum(map(_is_right_throughout, group)) for group in groups], k)
            if any(_steps(sample)[1] for group in groups for sample in group)
            else {}
        ),
        **_describe([[row] for row in greedy]),
        "sampled": {
            **clustered_share((count, k) for count in right).named("accuracy"),
            **_describe(groups),
        },
    }


def _estimates(right: Sequence[int], k: int) -> dict[str, Any]:
    """pass@n for each power of two n up to k, and k, from the number of right samples of each problem."""
    return {
        str(size): bootstrap_mean([pass_at_k(k, count, size) for count in right]).named("value")
        for size in sorted({*(2**power for power in range(k.bit_length())), k})
    }


def _is_right_throughout(sample: JudgedSample) -> bool:
    """A right answer, a judged step, and no wrong one."""
    wrong, judged = _steps(sample)
    return sample.outcome == 1 and judged > 0 and wrong == 0


def _by_problem(ids: Sequence[str], samples: Sequence[JudgedSample], what: str) -> Mapping[str, list[JudgedSample]]:
    groups: dict[str, list[JudgedSample]] = {problem_id: [] for problem_id in ids}
    for sample in samples:
        if sample.problem_id not in groups:
            raise UserError(f"{what} sample {sample.sample_id} is of a problem that is not evaluated")
        groups[sample.problem_id].append(sample)
    return groups


def _describe(groups: Sequence[Sequence[JudgedSample]]) -> dict[str, Any]:
    """Wrong steps inside right solutions, and what solutions look like; one group per problem.

    A right answer without a judged step takes no part in the two step metrics.
    """
    samples = [sample for group in groups for sample in group]
    wrong_and_judged = [[_steps(sample) for sample in group if sample.outcome == 1] for group in groups]
    flawed = [[wrong > 0 for wrong, judged in group if judged] for group in wrong_and_judged]
    if all(len(group) == 1 for group in groups):
        share = plain_share(flag for group in flawed for flag in group)
    else:
        share = clustered_share((sum(group), len(group)) for group in flawed)
    rate = clustered_share(
        (sum(wrong for wrong, _ in group), sum(judged for _, judged in group)) for group in wrong_and_judged
    )
    return {
        **share.named("wrong_step_share_of_correct"),
        **rate.named("wrong_step_rate_in_correct"),
        "num_correct": sum(sample.outcome == 1 for sample in samples),
        "truncated_share": _mean(sample.finish_reason == "length" for sample in samples),
        "unparsed_share": _mean(sample.extracted_answer is None for sample in samples),
        "undecided_share": _mean(sample.outcome is None for sample in samples),
        "mean_response_tokens": _mean(len(sample.token_ids) for sample in samples),
    }


def _steps(sample: JudgedSample) -> tuple[int, int]:
    """Wrong and judged steps of a solution."""
    labels = [step.label for step in sample.steps if step.label is not None]
    return labels.count(0), len(labels)


def _mean(values: Iterable[float]) -> float:
    seen = list(values)
    return sum(seen) / len(seen)

"""The judge stage: samples in, judged samples out, in the same order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_stepkto.errors import UserError
from megatron_stepkto.judging.equivalence import EquivalenceChecker
from megatron_stepkto.judging.outcome import Outcome, judge_outcomes
from megatron_stepkto.judging.process import Solution, Verdict, Workplace, cut_after_first_error, process_judge
from megatron_stepkto.progress import ProgressBar
from megatron_stepkto.prompts import load_tokenizer
from megatron_stepkto.recipe import Judging
from megatron_stepkto.records import Judge, JudgedSample, Problem, Sample, Step, read_records, set_aside, write_records
from megatron_stepkto.steps import step_spans

COUNTS = (
    "samples", "right", "wrong", "undecided", "unparsed", "truncated",
    "steps_right", "steps_wrong", "steps_unjudged",
)  # fmt: skip
OUTCOME_CHUNK = 2048  # samples whose answers are compared together
_Labelled = tuple[Sample, Problem, list[Step]]


def _read_problems(path: Path) -> dict[str, Problem]:
    problems: dict[str, Problem] = {}
    for problem in read_records(path, Problem):
        if problem.problem_id in problems:
            raise UserError(f"{path}: problem_id {problem.problem_id} stands twice; ids must be unique")
        problems[problem.problem_id] = problem
    return problems


class _Quarantine:
    """Where bad samples go when the user named a file; otherwise the first one ends the stage."""

    def __init__(self, path: Path | None, source: Path) -> None:
        self._path, self._source = path, source
        self._rows: list[dict[str, Any]] = []

    def reject(self, sample: Sample, reason: str) -> None:
        where = f"{self._source}: sample_id {sample.sample_id}"
        if self._path is None:
            raise UserError(f"{where}: {reason}; or pass --quarantine FILE to set bad rows aside")
        self._rows.append(
            {
                "file": str(self._source),
                "sample_id": sample.sample_id,
                "error": reason,
                "row": sample.model_dump_json(),
            }
        )

    def write(self) -> int:
        if self._path is not None and self._rows:
            set_aside(self._path, self._source, self._rows)
        return len(self._rows)


def _solution(sample: Sample, problems: dict[str, Problem], path: Path, tokenizer: Any, settings: Judging) -> Solution:
    problem = problems.get(sample.problem_id)
    if problem is None:
        raise UserError(f"problem_id {sample.problem_id} is not in {path}; give its problems")
    return Solution(
        solution_id=sample.sample_id,
        problem=problem,
        text=sample.text,
        steps=tuple(step_spans(sample.text, sample.token_ids, tokenizer, settings.split, settings.step_tag)),
        prompt_token_ids=tuple(sample.prompt_token_ids),
        token_ids=tuple(sample.token_ids),
        finished=sample.finish_reason != "length",
    )


def _labelled(solution: Solution, verdicts: list[Verdict], settings: Judging) -> list[Step]:
    if settings.after_first_error == "drop":
        verdicts = cut_after_first_error(verdicts)
    return [
        step.model_copy(
            update={"label": v.label, "votes": None if v.votes is None else list(v.votes), "score": v.score}
        )
        for step, v in zip(solution.steps, verdicts, strict=True)
    ]


def _count(judged: Sequence[JudgedSample]) -> dict[str, int]:
    counts = Counter(dict.fromkeys(COUNTS, 0))
    for row in judged:
        counts["samples"] += 1
        counts[{1: "right", 0: "wrong", None: "undecided"}[row.outcome]] += 1
        counts["unparsed"] += row.extracted_answer is None
        counts["truncated"] += row.finish_reason == "length"
        for step in row.steps:
            counts[{1: "steps_right", 0: "steps_wrong", None: "steps_unjudged"}[step.label]] += 1
    return dict(counts)


def judge_file(
    problems: Path,
    samples: Path,
    output: Path,
    tokenizer_dir: Path,
    settings: Judging,
    *,
    quarantine: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge every sample of a file and write JudgedSample rows in the same order, all or nothing.

    A solution that states no answer is wrong and counted as unparsed; one whose answer cannot be compared
    is undecided (outcome null). "wrong" in the counts includes unparsed.

    Returns:
        counts of samples, outcomes and steps, and "quarantined" when some were.

    Raises:
        UserError: a sample of an unknown problem, or whose text and tokens disagree (unless ``quarantine``).
    """
    by_id = _read_problems(problems)
    tokenizer = load_tokenizer(tokenizer_dir)
    place = Workplace(output.parent, tokenizer_dir, seed, settings.workers, settings.timeout_s)
    judge = process_judge(settings.process, place)
    who = Judge(outcome="answer", process=judge.name)
    rows = list(read_records(samples, Sample, quarantine=quarantine))
    bad = _Quarantine(quarantine, samples)
    split: list[tuple[Sample, Solution]] = []
    with ProgressBar("splitting into steps", len(rows), "samples") as bar:
        for number, sample in enumerate(rows, 1):
            try:
                split.append((sample, _solution(sample, by_id, problems, tokenizer, settings)))
            except UserError as error:
                bad.reject(sample, str(error))
            bar.update(number)
    good: list[_Labelled] = []
    for (sample, solution), verdicts in zip(split, judge.judge([s for _, s in split]), strict=True):
        if isinstance(verdicts, UserError):
            bad.reject(sample, str(verdicts))
        else:
            good.append((sample, solution.problem, _labelled(solution, verdicts, settings)))
    outcomes = _judge_answers(good, settings)
    judged = [
        JudgedSample(**dict(sample), steps=steps, outcome=outcome.label, extracted_answer=outcome.extracted, judge=who)
        for (sample, _, steps), outcome in zip(good, outcomes, strict=True)
    ]
    quarantined = bad.write()
    if not judged:
        raise UserError(f"{samples}: expected at least one good sample, all {quarantined} were bad; see {quarantine}")
    write_records(output, judged)
    return {**_count(judged), **judge.counts(), **({"quarantined": quarantined} if quarantined else {})}


def _judge_answers(good: Sequence[_Labelled], settings: Judging) -> list[Outcome]:
    outcomes: list[Outcome] = []
    with (
        EquivalenceChecker(settings.workers, settings.timeout_s) as checker,
        ProgressBar("judging answers", len(good), "samples") as bar,
    ):
        for start in range(0, len(good), OUTCOME_CHUNK):
            chunk = good[start : start + OUTCOME_CHUNK]
            outcomes += judge_outcomes(
                [sample.text for sample, _, _ in chunk],
                [problem.answer for _, problem, _ in chunk],
                checker,
                lambda done, start=start: bar.update(start + done),  # type: ignore[misc]
            )
            bar.update(len(outcomes))
    return outcomes

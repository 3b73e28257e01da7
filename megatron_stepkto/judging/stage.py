"""The judge stage: samples in, judged samples out, in the same order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_stepkto.errors import UserError
from megatron_stepkto.judging.equivalence import EquivalenceChecker
from megatron_stepkto.judging.outcome import Outcome, judge_outcomes
from megatron_stepkto.judging.process import ProcessJudge, process_judge
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


def _label(sample: Sample, problem: Problem, tokenizer: Any, settings: Judging, judge: ProcessJudge) -> list[Step]:
    steps = step_spans(sample.text, sample.token_ids, tokenizer, settings.split, settings.step_tag)
    labels = judge.label(problem, sample.text, [(step.start, step.end) for step in steps])
    return [step.model_copy(update={"label": label}) for step, label in zip(steps, labels, strict=True)]


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
    judge = process_judge(settings.process)
    who = Judge(outcome="answer", process=judge.name)
    rows = list(read_records(samples, Sample, quarantine=quarantine))
    bad = _Quarantine(quarantine, samples)
    good: list[_Labelled] = []
    with ProgressBar("judging steps", len(rows), "samples") as bar:
        for number, sample in enumerate(rows, 1):
            try:
                problem = by_id.get(sample.problem_id)
                if problem is None:
                    raise UserError(f"problem_id {sample.problem_id} is not in {problems}; give its problems")
                good.append((sample, problem, _label(sample, problem, tokenizer, settings, judge)))
            except UserError as error:
                bad.reject(sample, str(error))
            bar.update(number)
    outcomes = _judge_answers(good, settings)
    judged = [
        JudgedSample(**dict(sample), steps=steps, outcome=outcome.label, extracted_answer=outcome.extracted, judge=who)
        for (sample, _, steps), outcome in zip(good, outcomes, strict=True)
    ]
    quarantined = bad.write()
    if not judged:
        raise UserError(f"{samples}: expected at least one good sample, all {quarantined} were bad; see {quarantine}")
    write_records(output, judged)
    return {**_count(judged), **({"quarantined": quarantined} if quarantined else {})}


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

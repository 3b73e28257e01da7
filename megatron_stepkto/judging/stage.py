"""The judge stage: samples in, judged samples out, in the same order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_stepkto.answers.equivalence import EquivalenceChecker
from megatron_stepkto.answers.final_answer import extract_answer
from megatron_stepkto.base.cache import AnswerCache
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.progress import ProgressBar
from megatron_stepkto.base.records import (
    Judge,
    JudgedSample,
    Problem,
    Sample,
    Step,
    read_records,
    set_aside,
    write_records,
)
from megatron_stepkto.judging.classes import class_warnings
from megatron_stepkto.judging.outcome.answer import Outcome, judge_outcomes
from megatron_stepkto.judging.outcome.reward_model import OutcomeRewardModel
from megatron_stepkto.judging.process.interface import Solution, Verdict, Workplace, cut_after_first_error
from megatron_stepkto.judging.process.registry import process_judge
from megatron_stepkto.judging.row_tasks import run_task, tokenizer_hash
from megatron_stepkto.recipe.keys import Judging
from megatron_stepkto.recipe.prompts import load_tokenizer

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
            raise UserError(f"{path}: problem_id {problem.problem_id} is duplicated; ids must be unique")
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
            raise UserError(f"{where}: {reason}; correct it, or pass --quarantine FILE to set bad rows aside")
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


def _split(
    rows: Sequence[Sample], problems: dict[str, Problem], place: Workplace, tokenizer: Path, settings: Judging
) -> list[Solution | UserError]:
    """The solutions of known problems, in order; an error where text and tokens disagree."""
    options = {"tokenizer": str(tokenizer), "split": settings.split, "step_tag": settings.step_tag}
    found = run_task(
        "steps", options, [[row.text, row.token_ids] for row in rows], place.folder, place.workers,
        "splitting into steps", "samples", tokenizer_hash(tokenizer),
    )  # fmt: skip
    return [
        spans if isinstance(spans, UserError) else _solution(sample, problems[sample.problem_id], spans)
        for sample, spans in zip(rows, found, strict=True)
    ]


def _solution(sample: Sample, problem: Problem, spans: list[list[int]]) -> Solution:
    return Solution(
        solution_id=sample.sample_id,
        problem=problem,
        text=sample.text,
        steps=tuple(Step(start=a, end=b, token_start=c, token_end=d) for a, b, c, d in spans),
        prompt_token_ids=tuple(sample.prompt_token_ids),
        token_ids=tuple(sample.token_ids),
        finished=sample.finish_reason != "length",
    )


def _labelled(solution: Solution, verdicts: list[Verdict], settings: Judging) -> list[Step]:
    if settings.after_first_error == "drop":
        verdicts = cut_after_first_error(verdicts)
    return [step.model_copy(update=verdict.of_step()) for step, verdict in zip(solution.steps, verdicts, strict=True)]


def _count(judged: Sequence[JudgedSample]) -> dict[str, Any]:
    counts = Counter(dict.fromkeys(COUNTS, 0))
    for row in judged:
        counts["samples"] += 1
        counts[{1: "right", 0: "wrong", None: "undecided"}[row.outcome]] += 1
        counts["unparsed"] += row.extracted_answer is None
        counts["truncated"] += row.finish_reason == "length"
        for step in row.steps:
            counts[{1: "steps_right", 0: "steps_wrong", None: "steps_unjudged"}[step.label]] += 1
    share = round(counts["right"] / counts["samples"], 4) if counts["samples"] else None  # all may be quarantined
    warnings = class_warnings(counts)
    return {**counts, "right_share": share, **({"warnings": warnings} if warnings else {})}


def judge_file(
    problems: Path,
    samples: Path,
    output: Path,
    tokenizer_dir: Path,
    settings: Judging,
    *,
    quarantine: Path | None = None,
    seed: int = 0,
    hashes: Path | None = None,
) -> dict[str, Any]:
    """Judge every sample of a file and write JudgedSample rows in the same order, all or nothing.

    A solution that states no answer is wrong and counted as unparsed; one whose answer cannot be compared
    is undecided (outcome null). "wrong" in the counts includes unparsed.

    Args:
        tokenizer_dir: Hugging Face folder of the model that sampled.
        hashes: file that keeps the hashes of large folders (see ``stages.input_hash``).

    Returns:
        counts of samples, outcomes and steps, "quarantined" when some were, and "warnings" of one-sided labels.

    Raises:
        UserError: a sample of an unknown problem, or whose text and tokens disagree (unless ``quarantine``).
    """
    by_id = _read_problems(problems)
    load_tokenizer(tokenizer_dir)  # a folder without one is refused before the work
    place = Workplace(output.parent, tokenizer_dir, seed, settings.workers, settings.timeout_s, hashes)
    judge = process_judge(settings.process, place)
    judge.load()
    reward = _reward_model(by_id, problems, settings, place)
    rows = list(read_records(samples, Sample, quarantine=quarantine))
    bad = _Quarantine(quarantine, samples)
    known = [row for row in rows if row.problem_id in by_id]
    solutions = iter(_split(known, by_id, place, tokenizer_dir, settings))
    split: list[tuple[Sample, Solution]] = []
    for sample in rows:
        if sample.problem_id not in by_id:
            bad.reject(sample, f"problem_id {sample.problem_id} is not in {problems}; give its problems")
        elif isinstance(solution := next(solutions), UserError):
            bad.reject(sample, str(solution))
        else:
            split.append((sample, solution))
    good: list[_Labelled] = []
    for (sample, solution), verdicts in zip(split, judge.judge([s for _, s in split]), strict=True):
        if isinstance(verdicts, UserError):
            bad.reject(sample, str(verdicts))
        else:
            good.append((sample, solution.problem, _labelled(solution, verdicts, settings)))
    outcomes = _judge_answers([row for row in good if row[1].answer is not None], settings, output.parent)
    scored = _score([row for row in good if row[1].answer is None], reward)
    judged = [
        _judged(sample, steps, next(outcomes if problem.answer is not None else scored), judge.name, reward)
        for sample, problem, steps in good
    ]
    quarantined = bad.write()
    if not judged:
        raise UserError(f"{samples}: expected at least one good sample, all {quarantined} were bad; see {quarantine}")
    write_records(output, judged)
    counts = {**_count(judged), **judge.counts()}
    if reward is not None:
        counts["reward_model"] = {"dtype": reward.dtype}
    return counts | ({"quarantined": quarantined} if quarantined else {})


def check_judge(settings: Judging, model: Path, directory: Path, problems: Path | None = None) -> None:
    """Check that the judges can work on this machine now; see ``ProcessJudge.check``.

    Args:
        model: the folder of the model that samples, which need not be there yet. directory: where they work.
        problems: those whose solutions they judge; None: not known yet.

    Raises:
        UserError: they cannot.
    """
    process_judge(settings.process, Workplace(directory, model)).check()
    if problems is not None:
        check_answers_known(problems, settings, model, directory)


def check_answers_known(problems: Path, settings: Judging, model: Path, directory: Path) -> None:
    """Raises UserError where some problems of a file have no answer, and nothing else judges their solutions."""
    _reward_model(_read_problems(problems), problems, settings, Workplace(directory, model))


def _reward_model(
    problems: dict[str, Problem], path: Path, settings: Judging, place: Workplace
) -> OutcomeRewardModel | None:
    """The judge of solutions whose problem has no answer, where there is such a problem."""
    without = [problem.problem_id for problem in problems.values() if problem.answer is None]
    if not without:
        return None
    if settings.outcome is None:
        raise UserError(
            f"{path}: {len(without)} problems have no answer, such as {without[0]}; give answers, or name a reward "
            "model: judge.outcome: {reward_model: FOLDER, threshold: NUMBER}"
        )
    reward = OutcomeRewardModel(settings.outcome, place)
    reward.load()
    return reward


def _score(rows: Sequence[_Labelled], reward: OutcomeRewardModel | None) -> Iterator[Outcome]:
    if reward is None:
        return iter(())
    scores = reward.scores([(problem.problem, sample.text) for sample, problem, _ in rows])
    threshold = reward.settings.threshold
    return iter(
        [
            Outcome(1 if score > threshold else 0, extract_answer(row[0].text), reward.name, score)
            for row, score in zip(rows, scores, strict=True)
        ]
    )


def _judged(
    sample: Sample, steps: list[Step], outcome: Outcome, process: str, reward: OutcomeRewardModel | None
) -> JudgedSample:
    judge = Judge(outcome="answer", process=process)
    if outcome.score is not None and reward is not None:
        judge = Judge(outcome=reward.name, process=process, score=outcome.score, threshold=reward.settings.threshold)
    return JudgedSample(
        **dict(sample), steps=steps, outcome=outcome.label, extracted_answer=outcome.extracted, judge=judge
    )


def _judge_answers(good: Sequence[_Labelled], settings: Judging, directory: Path) -> Iterator[Outcome]:
    """Decided pairs are kept in ``directory/cache`` as they come: an interrupted stage decides none of them again."""
    outcomes: list[Outcome] = []
    if not good:
        return iter(outcomes)
    with (
        AnswerCache(directory / "cache" / "answers.jsonl") as cache,
        EquivalenceChecker(settings.workers, settings.timeout_s, cache) as checker,
        ProgressBar("judging answers", len(good), "samples") as bar,
    ):
        for start in range(0, len(good), OUTCOME_CHUNK):
            chunk = good[start : start + OUTCOME_CHUNK]
            outcomes += judge_outcomes(
                [sample.text for sample, _, _ in chunk],
                [problem.answer or "" for _, problem, _ in chunk],
                checker,
                lambda done, start=start: bar.update(start + done),  # type: ignore[misc]
            )
            bar.update(len(outcomes))
    return iter(outcomes)

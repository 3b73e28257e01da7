"""The judge stage: samples in, judged samples out, in the same order."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_stepkto.answers.equivalence import EquivalenceChecker
from megatron_stepkto.answers.final_answer import extract_answer
from megatron_stepkto.base.cache import AnswerCache
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.progress import ProgressBar
from megatron_stepkto.base.records import (
    Judge,
    JudgedSample,
    Label,
    Problem,
    Sample,
    Step,
    count_rows,
    read_records,
    set_aside,
    write_records,
)
from megatron_stepkto.judging.classes import class_warnings
from megatron_stepkto.judging.outcome.answer import Outcome, judge_outcomes
from megatron_stepkto.judging.outcome.reward_model import OutcomeRewardModel
from megatron_stepkto.judging.process.interface import (
    ProcessJudge,
    Solution,
    Verdict,
    Workplace,
    cut_after_first_error,
)
from megatron_stepkto.judging.process.registry import process_judge
from megatron_stepkto.judging.row_tasks import run_task, tokenizer_hash
from megatron_stepkto.recipe.keys import Judging
from megatron_stepkto.recipe.prompts import load_tokenizer

COUNTS = (
    "samples", "right", "wrong", "undecided", "unparsed", "truncated",
    "steps_right", "steps_wrong", "steps_unjudged",
)  # fmt: skip
OUTCOME_CHUNK = 2048  # samples whose answers are compared together


class _Labelled(NamedTuple):
    """A sample with its labelled steps. ``score``: a reward model's, if the problem has no answer."""

    sample: Sample
    problem: Problem
    steps: list[Step]
    score: float | None


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

    def __len__(self) -> int:
        return len(self._rows)

    def write(self) -> int:
        if self._path is not None and self._rows:
            set_aside(self._path, self._source, self._rows)
        return len(self._rows)


class _Split:
    """The good samples of a file as solutions. Each iteration reads the file again and skips the bad ones.

    The steps of a solution come from the cache, where ``check`` leaves them.
    """

    def __init__(
        self, samples: Path, problems: dict[str, Problem], place: Workplace, tokenizer: Path, settings: Judging,
        quarantine: Path | None,
    ) -> None:  # fmt: skip
        self._samples, self._problems, self._place, self._quarantine = samples, problems, place, quarantine
        self._options = {"tokenizer": str(tokenizer), "split": settings.split, "step_tag": settings.step_tag}
        self._tokenizer_hash = tokenizer_hash(tokenizer)
        self._good = 0

    def check(self, bad: _Quarantine, problems: Path) -> None:
        """Split every sample, so that a bad one is known before any is judged."""
        with ProgressBar("splitting into steps", count_rows(self._samples), "samples") as bar:
            for sample, found in self._pairs(bar):
                if found is None:
                    bad.reject(sample, f"problem_id {sample.problem_id} is not in {problems}; give its problems")
                elif isinstance(found, UserError):
                    bad.reject(sample, str(found))
                else:
                    self._good += 1

    def samples(self) -> Iterator[tuple[Sample, Solution]]:
        """The good samples, each with its solution."""
        return ((sample, found) for sample, found in self._pairs() if isinstance(found, Solution))

    def without_answer(self) -> Iterator[tuple[str, str]]:
        """(problem, text) of each good sample whose problem has no answer."""
        return ((s.problem.problem, s.text) for s in self if s.problem.answer is None)

    def __len__(self) -> int:
        return self._good

    def __iter__(self) -> Iterator[Solution]:
        return (solution for _, solution in self.samples())

    def _pairs(self, bar: ProgressBar | None = None) -> Iterator[tuple[Sample, Solution | UserError | None]]:
        """Each sample with its solution, with what is wrong with it, or with None: its problem is not known."""
        ahead: deque[Sample] = deque()  # given to the splitter, which reads some before it answers

        def rows() -> Iterator[list[Any]]:
            for sample in read_records(self._samples, Sample, quarantine=self._quarantine):
                ahead.append(sample)
                if sample.problem_id in self._problems:
                    yield [sample.text, sample.token_ids]

        place = self._place
        found = run_task(
            "steps", self._options, rows(), place.folder, place.workers, bar, self._tokenizer_hash
        )  # fmt: skip
        for spans in found:
            while ahead[0].problem_id not in self._problems:
                yield ahead.popleft(), None
            sample = ahead.popleft()
            error = isinstance(spans, UserError)
            yield sample, spans if error else _solution(sample, self._problems[sample.problem_id], spans)
        yield from ((sample, None) for sample in ahead)


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


def _count(counts: Counter[str], row: JudgedSample) -> None:
    counts["samples"] += 1
    counts[{1: "right", 0: "wrong", None: "undecided"}[row.outcome]] += 1
    counts["unparsed"] += row.extracted_answer is None
    counts["truncated"] += row.finish_reason == "length"
    for step in row.steps:
        counts[{1: "steps_right", 0: "steps_wrong", None: "steps_unjudged"}[step.label]] += 1


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
    bad = _Quarantine(quarantine, samples)
    solutions = _Split(samples, by_id, place, tokenizer_dir, settings, quarantine)
    solutions.check(bad, problems)
    counts = Counter(dict.fromkeys(COUNTS, 0))

    def judged() -> Iterator[JudgedSample]:
        labelled = _label(solutions, judge, reward, settings, bad)
        for row in _judge_answers(labelled, len(solutions), settings, output.parent, judge.name, reward):
            _count(counts, row)
            yield row
        quarantined = bad.write()
        if not counts["samples"]:
            raise UserError(
                f"{samples}: expected at least one good sample, all {quarantined} were bad; see {quarantine}"
            )

    write_records(output, judged())
    warnings = class_warnings(counts)
    return {
        **counts,
        "right_share": round(counts["right"] / counts["samples"], 4),
        **({"warnings": warnings} if warnings else {}),
        **judge.counts(),
        **({} if reward is None else {"reward_model": {"dtype": reward.dtype}}),
        **({"quarantined": len(bad)} if len(bad) else {}),
    }


def _label(
    solutions: _Split, judge: ProcessJudge[Any], reward: OutcomeRewardModel | None, settings: Judging, bad: _Quarantine
) -> Iterator[_Labelled]:
    """The samples that have verdicts, with the scores of those that a reward model judges."""
    scores = None if reward is None else reward.scores(solutions.without_answer())
    with contextlib.closing(judge.judge(solutions)) as judged:
        for (sample, solution), verdicts in zip(solutions.samples(), judged, strict=True):
            score = next(scores) if scores is not None and solution.problem.answer is None else None
            if isinstance(verdicts, UserError):
                bad.reject(sample, str(verdicts))
            else:
                yield _Labelled(sample, solution.problem, _labelled(solution, verdicts, settings), score)


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


def _judge_answers(
    labelled: Iterator[_Labelled], total: int, settings: Judging, directory: Path, process: str,
    reward: OutcomeRewardModel | None,
) -> Iterator[JudgedSample]:  # fmt: skip
    """Decided pairs are kept in ``directory/cache`` as they come: an interrupted stage decides none of them again."""
    chunk = list(itertools.islice(labelled, OUTCOME_CHUNK))  # first: rollouts, too, keep pairs in this cache
    with (
        AnswerCache(directory / "cache" / "answers.jsonl") as cache,
        EquivalenceChecker(settings.workers, settings.timeout_s, cache) as checker,
        ProgressBar("judging answers", total, "samples") as bar,
    ):
        done = 0
        while chunk:
            answered = [row for row in chunk if row.problem.answer is not None]
            outcomes = iter(
                judge_outcomes(
                    [row.sample.text for row in answered],
                    [row.problem.answer or "" for row in answered],
                    checker,
                    lambda decided, done=done: bar.update(done + decided),  # type: ignore[misc]
                )
            )
            for row in chunk:
                outcome = next(outcomes) if row.problem.answer is not None else _scored(row, reward)
                yield _judged(row, outcome, process, reward)
            done += len(chunk)
            bar.update(done)
            chunk = list(itertools.islice(labelled, OUTCOME_CHUNK))


def _scored(row: _Labelled, reward: OutcomeRewardModel | None) -> Outcome:
    assert reward is not None
    label: Label = None if row.score is None else 1 if row.score > reward.settings.threshold else 0
    return Outcome(label, extract_answer(row.sample.text), reward.name, row.score)


def _judged(row: _Labelled, outcome: Outcome, process: str, reward: OutcomeRewardModel | None) -> JudgedSample:
    judge = Judge(outcome="answer", process=process)
    if row.problem.answer is None and reward is not None:
        judge = Judge(outcome=reward.name, process=process, score=outcome.score, threshold=reward.settings.threshold)
    return JudgedSample(
        **dict(row.sample), steps=row.steps, outcome=outcome.label, extracted_answer=outcome.extracted, judge=judge
    )

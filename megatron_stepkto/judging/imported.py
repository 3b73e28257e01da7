"""Files of judged solutions -> Problem and JudgedSample records, as sampling and judging leave them."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_stepkto.answers.final_answer import extract_answer
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.progress import ProgressBar, warn
from megatron_stepkto.base.records import Judge, JudgedSample, Label, Problem, Step, read_rows, write_records
from megatron_stepkto.judging.classes import class_warnings
from megatron_stepkto.problems.imported.formats import importer_of
from megatron_stepkto.problems.imported.solution import ImportedRow, ImportedSolution, same_answer
from megatron_stepkto.problems.imported.trl import COLUMNS
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.prompts import BadText, Prompts

STATES: dict[Label, str] = {1: "right", 0: "wrong", None: "unjudged"}
GOLD_SOURCES = frozenset({"bigbench_mistake", "gsm8k_solutions", "mrben", "omegaprm", "prm800k"})
BATCH = 256  # solutions tokenised at once


@dataclass(frozen=True)
class Imported:
    """``solutions`` have distinct ids; solutions of one problem share its text, so also its prompt."""

    solutions: list[ImportedSolution]
    problems: list[Problem]
    counts: dict[str, Any] = field(default_factory=dict)


def read_imports(
    imports: Sequence[recipe.Import], *, quarantine: Path | None = None, prompts: Prompts | None = None
) -> Imported:
    """Read files of public formats and bring them together.

    Two problems are the same where their texts are equal up to white space. A problem's answer is the gold
    one of any source, else the one that a right solution states; a problem without a known answer has no
    Problem record (nothing could be sampled for it and judged), but its solutions are kept.

    Args:
        quarantine: JSON-lines file for bad rows; without it the first bad row ends the reading.
        prompts: what the solutions will be tokenised with; a row that holds its special tokens is a bad one.

    Raises:
        UserError: unknown format, or a bad row (file:line); one solution id with two texts is one.
    """
    if quarantine is not None:
        quarantine.parent.mkdir(parents=True, exist_ok=True)
    first: dict[str, ImportedSolution] = {}  # problem_id -> the solution that gave the problem's text
    kept: dict[str, ImportedSolution] = {}
    sources: dict[str, dict[str, Any]] = {}
    duplicates = 0

    def seen(solution: ImportedSolution) -> bool:
        """Raises ValueError for one that is there with different content."""
        shown = first.get(solution.problem_id, solution)
        known = kept.get(solution.solution_id)
        if known is not None and known != solution.model_copy(update={"problem": shown.problem}):
            raise ValueError(
                f"solution {solution.solution_id} is duplicated with different content; give each solution its own id, "
                "or import the files separately"
            )
        return known is not None

    for item in imports:
        counts = sources.setdefault(str(item.path), _no_counts(item.format))
        ignored: set[str] = set()
        for row in read_rows(item.path, _parser(item.format, prompts, ignored, seen), quarantine=quarantine):
            counts["rows"] += 1
            if row.skipped:
                counts["skipped"][row.skipped] = counts["skipped"].get(row.skipped, 0) + 1
            for solution in row.solutions:
                shown = first.setdefault(solution.problem_id, solution)
                solution = solution.model_copy(update={"problem": shown.problem})
                if seen(solution):
                    duplicates += 1
                    continue
                kept[solution.solution_id] = solution
                _count(counts, solution)
        if ignored:
            counts["ignored_columns"] = sorted(ignored)
    solutions = list(kept.values())
    problems = _problems(solutions)
    return Imported(
        solutions,
        problems,
        {
            "problems": len(first),
            "problems_without_answer": len(first) - len(problems),
            "problems_with_conflicting_answers": _num_conflicts(solutions),
            "solutions": len(solutions),
            "duplicates_dropped": duplicates,
            "sources": sources,
        },
    )


def _parser(
    name: str, prompts: Prompts | None, ignored: set[str], seen: Callable[[ImportedSolution], bool]
) -> Callable[[dict[str, Any]], ImportedRow]:
    """``ignored`` collects the columns that the format does not use, where it says which it does. ``seen`` refuses a
    solution that contradicts one before it."""
    importer = importer_of(name)
    used = COLUMNS.get(importer.__name__.removeprefix("parse_"))

    def parse(row: dict[str, Any]) -> ImportedRow:
        parsed = importer(row)
        for solution in parsed.solutions if prompts is not None else ():
            assert prompts is not None
            if solution.turns:
                prompts.conversation(solution.turns)
            else:
                prompts.check_problem(solution.problem)
            prompts.check_response(solution.text)
        of_row: dict[str, ImportedSolution] = {}
        for solution in parsed.solutions:
            seen(solution)
            if of_row.setdefault(solution.solution_id, solution) != solution:
                raise ValueError(f"holds solution {solution.solution_id} twice, with different content")
        if used is not None:
            ignored.update(row.keys() - used)
        return parsed

    return parse


def _no_counts(name: str) -> dict[str, Any]:
    states = dict.fromkeys(STATES.values(), 0)
    return {
        "format": name, "rows": 0, "solutions": 0, "outcomes": states, "steps": dict(states), "skipped": {},
    }  # fmt: skip


def _count(counts: dict[str, Any], solution: ImportedSolution) -> None:
    counts["solutions"] += 1
    counts["outcomes"][STATES[solution.outcome]] += 1
    for label in solution.labels:
        counts["steps"][STATES[label]] += 1


def _problems(solutions: Sequence[ImportedSolution]) -> list[Problem]:
    answers: dict[str, ImportedSolution] = {}
    for solution in solutions:
        known = answers.get(solution.problem_id)
        better = known is None or (known.source not in GOLD_SOURCES and solution.source in GOLD_SOURCES)
        if solution.answer is not None and better:
            answers[solution.problem_id] = solution
    return [
        Problem(problem_id=number, problem=solution.problem, answer=str(solution.answer))
        for number, solution in answers.items()
    ]


def _num_conflicts(solutions: Sequence[ImportedSolution]) -> int:
    """Problems for which two sources give different numbers: a sign of a mislabelled file."""
    answers: dict[str, str] = {}
    conflicting = set()
    for solution in solutions:
        if solution.answer is not None:
            known = answers.setdefault(solution.problem_id, solution.answer)
            if same_answer(solution.answer, known) == 0:
                conflicting.add(solution.problem_id)
    return len(conflicting)


def judged_samples(solutions: Sequence[ImportedSolution], prompts: Prompts) -> Iterator[JudgedSample]:
    """Tokenise each solution once and lay its labelled steps over the tokens, in order.

    A finished solution gets the end token, and finish_reason "stop"; a beginning has "length". A token that
    reaches over a boundary belongs to the step in which it starts. A step in which no token starts (one token
    holds its end and the step before) keeps an empty span and loses its label: it has no log-prob of its own.

    Raises:
        UserError: the tokenizer gives no character offsets or has no end token, or a text holds special tokens.
    """
    tokenizer = prompts.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("the tokenizer gives no character offsets; expected one with a tokenizer.json")
    end_token = prompts.end_token
    asked: dict[str, list[int]] = {}
    for begin in range(0, len(solutions), BATCH):
        batch = solutions[begin : begin + BATCH]
        texts = [solution.text for solution in batch]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        rows = zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for solution, token_ids, offsets in rows:
            try:
                if solution.problem_id not in asked:
                    asked[solution.problem_id] = (
                        prompts.conversation(solution.turns) if solution.turns else prompts.token_ids(solution.problem)
                    )
                prompts.check_response(solution.text, token_ids)
            except BadText as error:
                raise UserError(f"solution {solution.solution_id}: {error}") from None
            end = [end_token] if solution.finished else []
            yield JudgedSample(
                problem_id=solution.problem_id,
                sample_id=solution.solution_id,
                prompt_token_ids=asked[solution.problem_id],
                token_ids=[*token_ids, *end],
                text=solution.text,
                finish_reason="stop" if solution.finished else "length",
                steps=_steps(solution, offsets, len(token_ids) + len(end)),
                outcome=solution.outcome,
                extracted_answer=extract_answer(solution.text),
                judge=Judge(outcome=solution.source, process=solution.source),
            )


def _starts(offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The character at which each token starts.

    Many tokenizers trim the leading space of a token from its offsets: what is between two tokens belongs
    to the later one.
    """
    starts, reached = [], 0
    for start, end in offsets:
        starts.append(min(start, reached))  # less than reached: bytes of one character share its start
        reached = max(reached, end)
    return starts


def _steps(solution: ImportedSolution, offsets: Sequence[tuple[int, int]], num_tokens: int) -> list[Step]:
    starts = _starts(offsets)
    steps = []
    begin = token_begin = 0
    # The end token belongs to the last step in which a token starts: a step that shares all of its text's tokens with
    # the one before has none, and must not train the end token under its label.
    ends = list(itertools.accumulate(map(len, solution.steps)))
    final = next(
        (number for number, end in enumerate(ends) if bisect.bisect_left(starts, end) == len(starts)), len(ends) - 1
    )
    for number, (end, label) in enumerate(zip(ends, solution.labels, strict=True)):
        token_end = num_tokens if number >= final else bisect.bisect_left(starts, end)
        steps.append(
            Step(
                start=begin,
                end=end,
                token_start=token_begin,
                token_end=token_end,
                label=label if token_end > token_begin else None,
            )
        )
        begin, token_begin = end, token_end
    return steps


def import_all(
    imports: Sequence[recipe.Import], tokenizer_dir: Path, prompt: recipe.Prompt, problems_out: Path,
    judged_out: Path, *, quarantine: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Import several files as one data set; both outputs are written whole or not at all.

    Returns:
        Counts of problems, solutions, steps and outcomes per file, and of tokens; "warnings" of one-sided labels.

    Raises:
        UserError: see ``read_imports`` and ``judged_samples``.
    """
    prompts = Prompts.of(prompt, tokenizer_dir)
    for message in prompts.warnings:
        warn(message)
    if prompts.thinks:
        warn(
            f"{tokenizer_dir}: prompts end inside a <think> block: the model learns the imported solutions as thoughts"
        )
    imported = read_imports(imports, quarantine=quarantine, prompts=prompts)
    tokens: Counter[str] = Counter()
    labels: Counter[str] = Counter()

    def counted() -> Iterator[JudgedSample]:
        with ProgressBar("importing", len(imported.solutions), "solutions") as bar:
            for done, sample in enumerate(judged_samples(imported.solutions, prompts), 1):
                tokens["response_tokens"] += len(sample.token_ids)
                tokens["longest_example"] = max(
                    tokens["longest_example"], len(sample.prompt_token_ids) + len(sample.token_ids)
                )
                if sample.outcome is not None:
                    labels["right" if sample.outcome else "wrong"] += 1
                for step in sample.steps:
                    if step.label is not None:
                        labels["steps_right" if step.label else "steps_wrong"] += 1
                tokens["steps_without_tokens"] += sum(s.token_end == s.token_start for s in sample.steps)
                bar.update(done)
                yield sample

    write_records(judged_out, counted())
    write_records(problems_out, imported.problems)
    warnings = class_warnings(labels)
    return {**imported.counts, **tokens, **({"warnings": warnings} if warnings else {})}

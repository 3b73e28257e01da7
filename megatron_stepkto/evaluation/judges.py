"""How far a process judge can be trusted: its labels compared with those of people (``stepkto judge-eval``).

People judged each solution up to the first wrong step. ProcessBench's measure (arXiv 2412.06559) asks for that
step: a judge predicts the first step that it calls wrong, or -1 where it calls none wrong. *Error accuracy* is
the share of erroneous solutions whose first wrong step it names exactly, *correct accuracy* the share of correct
ones in which it calls no step wrong, F1 their harmonic mean. A judge that judges nothing predicts -1 always: it
has correct accuracy 100% and F1 0.

What training sees are single labels, so they are counted too, on the steps that people judged: the precision of
"wrong" and of "right", the share of wrong and right steps that are found, and the share that is judged at all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import read_json, sha256_of, write_json
from megatron_stepkto.base.locks import exclusive_lock
from megatron_stepkto.base.records import Label, Problem, Step
from megatron_stepkto.base.stage import package_versions
from megatron_stepkto.evaluation.statistics import Share, clustered_share, plain_share
from megatron_stepkto.judging.imported import GOLD_SOURCES, judged_samples, read_imports
from megatron_stepkto.judging.process import Solution, Workplace, cut_after_first_error
from megatron_stepkto.judging.process.registry import process_judge
from megatron_stepkto.judging.section import judging_key
from megatron_stepkto.problems.imported.solution import ImportedSolution
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.prompts import Prompts

RESAMPLES = 2000
REPORT = "judge_eval.json"


@dataclass(frozen=True)
class Judged:
    """One solution: labels of people and of the judge, step by step."""

    gold: tuple[Label, ...]
    given: tuple[Label, ...]

    @property
    def error(self) -> int:
        """ProcessBench's label: the first wrong step, -1 for none."""
        return first_wrong(self.gold)

    @property
    def found(self) -> bool:
        return first_wrong(self.given) == self.error


def first_wrong(labels: Sequence[Label]) -> int:
    return next((number for number, label in enumerate(labels) if label == 0), -1)


def f1(error_accuracy: float | None, correct_accuracy: float | None) -> float | None:
    """Harmonic mean of the two accuracies, as ProcessBench defines it; 0 where both are 0."""
    if error_accuracy is None or correct_accuracy is None:
        return None
    total = error_accuracy + correct_accuracy
    return 2 * error_accuracy * correct_accuracy / total if total else 0.0


def _f1_interval(errors: Sequence[bool], corrects: Sequence[bool]) -> list[float] | None:
    """95% percentile bootstrap over solutions, erroneous and correct ones apart."""
    if not errors or not corrects:
        return None
    rng = random.Random(0)
    counts = [(len(flags), sum(flags) / len(flags)) for flags in (errors, corrects)]
    # resampling n flags with replacement draws the number of successes from a binomial distribution
    values = sorted(
        f1(*(sum(rng.random() < share for _ in range(size)) / size for size, share in counts)) or 0.0
        for _ in range(RESAMPLES)
    )
    return [values[int(0.025 * RESAMPLES)], values[int(0.975 * RESAMPLES) - 1]]


def score(rows: Sequence[Judged]) -> dict[str, Any]:
    """All measures of one source, with counts and 95% intervals (steps: clustered by solution)."""
    erroneous = [row.found for row in rows if row.error >= 0]
    correct = [row.found for row in rows if row.error < 0]
    error_accuracy, correct_accuracy = plain_share(erroneous), plain_share(correct)
    result = {
        "solutions": len(rows),
        "erroneous": len(erroneous),
        "correct": len(correct),
        **_measured("error_accuracy", error_accuracy),
        **_measured("correct_accuracy", correct_accuracy),
        "f1": f1(error_accuracy.value, correct_accuracy.value),
        "f1_interval": _f1_interval(erroneous, correct),
    }
    pairs = [[(gold, given) for gold, given in zip(r.gold, r.given, strict=True) if gold is not None] for r in rows]
    table = {
        f"people_{person}_judge_{judge}": sum((p, j) == (person_label, judge_label) for row in pairs for p, j in row)
        for person, person_label in (("right", 1), ("wrong", 0))
        for judge, judge_label in (("right", 1), ("wrong", 0), ("null", None))
    }

    def share(of: Callable[[Label, Label], bool], among: Callable[[Label, Label], bool]) -> Share:
        return clustered_share(
            (sum(among(*p) and of(*p) for p in row), sum(among(*p) for p in row)) for row in pairs
        )  # fmt: skip

    return {
        **result,
        "steps": table,
        **_measured("judged_share", share(lambda p, j: j is not None, lambda p, j: True)),
        **_measured("precision_of_wrong", share(lambda p, j: p == 0, lambda p, j: j == 0)),
        **_measured("precision_of_right", share(lambda p, j: p == 1, lambda p, j: j == 1)),
        **_measured("wrong_steps_found", share(lambda p, j: j == 0, lambda p, j: p == 0)),
        **_measured("right_steps_found", share(lambda p, j: j == 1, lambda p, j: p == 1)),
    }


def _measured(key: str, share: Share) -> dict[str, Any]:
    return {key: share.value, f"{key}_interval": None if share.interval is None else list(share.interval)}


# --- the command -----------------------------------------------------------------------------------------------


def judge_eval(
    settings: recipe.Judging,
    files: Sequence[recipe.Import],
    output: Path,
    *,
    tokenizer: Path | None = None,
    limit: int | None = None,
    quarantine: Path | None = None,
    prompt: recipe.Prompt | None = None,
) -> dict[str, Any]:
    """Judge solutions that people judged; leaves ``output/judge_eval.json`` and returns it.

    After a kill the same call resumes: judges keep finished answers in ``output/cache``.

    Args:
        tokenizer: Hugging Face folder; its tokens are needed by rollouts alone.
        limit: judge the first N solutions of each file.

    Raises:
        UserError: bad input, see ``read_imports``; a solution that the judge cannot take; nothing to judge.
    """
    # one file at a time: two files may hold the same solution
    sources = {str(file.path): _solutions(file, limit, quarantine) for file in files}
    flat = [(name, solution) for name, solutions in sources.items() for solution in solutions]
    made = _as_seen_by_judge([solution for _, solution in flat], tokenizer, prompt or recipe.Prompt())
    with exclusive_lock(output / ".lock", str(output)):
        hashes = output / ".hashes.json"
        place = Workplace(output, tokenizer, 0, settings.workers, settings.timeout_s, hashes)
        judge = process_judge(settings.process, place)
        judge.load()
        rows: dict[str, list[Judged]] = {name: [] for name in sources}
        refused: dict[str, list[str]] = {name: [] for name in sources}
        for (name, solution), verdicts in zip(flat, judge.judge(made), strict=True):
            if isinstance(verdicts, UserError):
                # counts as not judged: else a judge would look better by refusing
                refused[name].append(f"{solution.solution_id}: {verdicts}")
                given: list[Label] = [None] * len(solution.steps)
            else:
                kept = cut_after_first_error(verdicts) if settings.after_first_error == "drop" else verdicts
                given = [verdict.label for verdict in kept]
            rows[name].append(Judged(solution.labels, tuple(given)))
        report = {
            "judge": judge.name,
            "settings": judging_key(settings, tokenizer, hashes),
            "versions": package_versions(),
            "work": judge.counts(),
            "sources": [
                {
                    "file": Path(name).name,
                    "sha256": sha256_of(Path(name)),
                    "format": file.format,
                    **score(rows[name]),
                    "refused": len(refused[name]),
                    "first_refused": refused[name][:3],
                }
                for name, file in zip(sources, files, strict=True)
            ],
        }
        write_json(output / REPORT, report)
    return dict(read_json(output / REPORT))


def _solutions(file: recipe.Import, limit: int | None, quarantine: Path | None) -> list[ImportedSolution]:
    solutions = read_imports([file], quarantine=quarantine).solutions
    judged = [solution for solution in solutions if any(label is not None for label in solution.labels)]
    if not judged:
        raise UserError(f"{file.path}: expected solutions whose steps people judged, got none; choose another file")
    return judged[:limit]


def _as_seen_by_judge(
    solutions: Sequence[ImportedSolution], tokenizer: Path | None, prompt: recipe.Prompt
) -> list[Solution]:
    problems = [
        # Only a gold answer may be shown. One taken from a right solution would reveal that it is right.
        Problem.model_construct(
            problem_id=s.problem_id,
            problem=s.problem,
            answer=(s.source in GOLD_SOURCES and s.answer) or "",
            solution=None,
        )
        for s in solutions
    ]
    if tokenizer is None:
        return [
            Solution(s.solution_id, problem, s.text, _steps(s.steps), finished=s.finished)
            for s, problem in zip(solutions, problems, strict=True)
        ]
    samples = judged_samples(solutions, Prompts.of(prompt, tokenizer))
    return [
        Solution(
            s.solution_id, problem, s.text, tuple(step.model_copy(update={"label": None}) for step in sample.steps),
            tuple(sample.prompt_token_ids), tuple(sample.token_ids), s.finished,
        )
        for s, problem, sample in zip(solutions, problems, samples, strict=True)
    ]  # fmt: skip


def _steps(texts: Sequence[str]) -> tuple[Step, ...]:
    steps, position = [], 0
    for text in texts:
        steps.append(Step(start=position, end=position + len(text), token_start=0, token_end=0))
        position += len(text)
    return tuple(steps)


# --- the table -------------------------------------------------------------------------------------------------


def report_table(report: dict[str, Any]) -> str:
    """Markdown: one line per source, then how to read the predictions of -1."""
    lines = [
        f"judge: {report['judge']}",
        "",
        "| source | solutions | error acc. | correct acc. | F1 | steps judged | precision of wrong | wrong found "
        "| precision of right | right found |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    columns = (
        "error_accuracy", "correct_accuracy", "f1", "judged_share", "precision_of_wrong", "wrong_steps_found",
        "precision_of_right", "right_steps_found",
    )  # fmt: skip
    for row in report["sources"]:
        cells = [_cell(row[key], row[f"{key}_interval"]) for key in columns]
        lines.append(f"| {row['file']} | {row['solutions']} | {' | '.join(cells)} |")
    lines += [
        "",
        '[95% interval]. Where the judge calls no step wrong it predicts "no error" (-1), also where it judged '
        "nothing: read the accuracies beside the share of steps judged.",
    ]
    refused = sum(row["refused"] for row in report["sources"])
    if refused:
        first = next(row["first_refused"][0] for row in report["sources"] if row["refused"])
        lines.append(f"{refused} solutions could not be judged and count as not judged; the first: {first}")
    return "\n".join(lines)


def _cell(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "–"
    shown = f"{100 * value:.1f}"
    return shown if interval is None else f"{shown} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"

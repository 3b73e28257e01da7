"""``stepkto judge-eval``: a process judge, its members and another judge against human labels.

The measures are in ``judge_measures.py``. Labels of every solution are kept beside the report, so that two judges can
be compared on the same solutions afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import read_json, sha256_of, write_json
from megatron_stepkto.base.locks import exclusive_lock
from megatron_stepkto.base.records import Label, Problem, Record, Step, read_records, write_records
from megatron_stepkto.base.stage import package_versions
from megatron_stepkto.evaluation.judge_measures import Judged, compare, score
from megatron_stepkto.judging.imported import GOLD_SOURCES, judged_samples, read_imports
from megatron_stepkto.judging.process.interface import Solution, Verdict, Verdicts, Workplace, cut_after_first_error
from megatron_stepkto.judging.process.registry import process_judge
from megatron_stepkto.judging.section import judging_key
from megatron_stepkto.problems.imported.solution import ImportedSolution
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.prompts import Prompts

REPORT, LABELS = "judge_eval.json", "labels.jsonl"


class JudgeLabels(Record):
    """What one judge said of a solution; ``scores`` where it gave any."""

    labels: list[Label]
    scores: list[float | None] = Field(default_factory=list)


class EvaluatedSolution(Record):
    """Human labels (``gold``), of the judge and, of a combined one, of its members by name.

    ``file``: sha256 of the file that it is from.
    """

    file: str
    solution_id: str
    gold: list[Label]
    outcome: Label
    given: JudgeLabels
    members: dict[str, JudgeLabels] = Field(default_factory=dict)

    def judged(self, given: JudgeLabels) -> Judged:
        return Judged(tuple(self.gold), tuple(given.labels), tuple(given.scores), self.outcome)


# --- the command -----------------------------------------------------------------------------------------------


def judge_eval(
    settings: recipe.Judging,
    files: Sequence[recipe.Import],
    output: Path,
    *,
    tokenizer: Path | None = None,
    limit: int | None = None,
    quarantine: Path | None = None,
    against: Path | None = None,
) -> dict[str, Any]:
    """Judge solutions that people judged; leaves ``output/judge_eval.json`` and returns it.

    After a kill the same call resumes: judges keep finished answers in ``output/cache``.

    Args:
        tokenizer: Hugging Face folder; its tokens are needed by rollouts alone.
        limit: judge the first N solutions of each file.
        against: output folder of another judge's evaluation: the two are compared on the solutions that both judged.

    Raises:
        UserError: bad input, see ``read_imports``; a solution that the judge cannot take; nothing to judge.
    """
    other = None if against is None else _read_other(against)
    # one file at a time: two files may hold the same solution
    sources = {str(file.path): _solutions(file, limit, quarantine) for file in files}
    for path, count in Counter(str(file.path) for file in files).items():
        if count > 1:
            raise UserError(f"judge-eval: expected each file once, got {path} twice; name it once")
    flat = [(name, solution) for name, solutions in sources.items() for solution in solutions]
    made = _as_seen_by_judge([solution for _, solution in flat], tokenizer)
    with exclusive_lock(output / ".lock", str(output)):
        hashes = output / ".hashes.json"
        place = Workplace(output, tokenizer, 0, settings.workers, settings.timeout_s, hashes)
        judge = process_judge(settings.process, place)
        judge.load()
        rows: dict[str, list[EvaluatedSolution]] = {name: [] for name in sources}
        refused: dict[str, list[str]] = {name: [] for name in sources}
        hash_of = {name: sha256_of(Path(name)) for name in sources}
        drop = settings.after_first_error == "drop"
        for (name, solution), verdicts in zip(flat, judge.judge(made), strict=True):
            if isinstance(verdicts, UserError):
                # counts as not judged: else a judge would look better by refusing
                refused[name].append(f"{solution.solution_id}: {verdicts}")
            rows[name].append(_evaluated(hash_of[name], solution, verdicts, list(judge.members()), drop))
        write_records(output / LABELS, [row for name in sources for row in rows[name]])
        report = {
            "judge": judge.name,
            "settings": judging_key(settings, tokenizer, hashes),
            "versions": package_versions(),
            "work": judge.counts(),
            "sources": [
                {
                    "file": Path(name).name,
                    "sha256": hash_of[name],
                    "format": file.format,
                    **score([row.judged(row.given) for row in rows[name]]),
                    "refused": len(refused[name]),
                    "first_refused": refused[name][:3],
                    **_members(rows[name]),
                    **({} if other is None else {"against": _against(rows[name], *other)}),
                }
                for name, file in zip(sources, files, strict=True)
            ],
        }
        write_json(output / REPORT, report)
    return dict(read_json(output / REPORT))


def _evaluated(
    file: str, solution: ImportedSolution, verdicts: Verdicts, members: Sequence[str], drop: bool
) -> EvaluatedSolution:
    steps = [Verdict(None)] * len(solution.steps) if isinstance(verdicts, UserError) else verdicts

    def labels(given: Sequence[Verdict]) -> JudgeLabels:
        kept = cut_after_first_error(given) if drop else given
        scores = [verdict.score for verdict in given]
        scored = any(value is not None for value in scores)
        return JudgeLabels(labels=[verdict.label for verdict in kept], scores=scores if scored else [])

    return EvaluatedSolution(
        file=file, solution_id=solution.solution_id, gold=list(solution.labels), outcome=solution.outcome,
        given=labels(steps),
        members={name: labels([(step.members or {}).get(name, Verdict(None)) for step in steps]) for name in members},
    )  # fmt: skip


def _members(rows: Sequence[EvaluatedSolution]) -> dict[str, Any]:
    """Measures of each member of a combined judge, and the combination compared with it."""
    names = rows[0].members
    if not names:
        return {}
    whole = [row.judged(row.given) for row in rows]
    alone = {name: [row.judged(row.members[name]) for row in rows] for name in names}
    return {
        "members": {name: score(member) | {"combination": compare(whole, member)} for name, member in alone.items()}
    }


def _read_other(folder: Path) -> tuple[str, dict[tuple[str, str], EvaluatedSolution]]:
    """Another judge's name and labels, by file and solution."""
    if not (folder / REPORT).is_file() or not (folder / LABELS).is_file():
        raise UserError(
            f"judge-eval: --against {folder}: expected {REPORT} and {LABELS}, which a finished judge-eval leaves; "
            "run it for the other judge"
        )
    rows = read_records(folder / LABELS, EvaluatedSolution)
    return str(read_json(folder / REPORT)["judge"]), {(row.file, row.solution_id): row for row in rows}


def _against(
    rows: Sequence[EvaluatedSolution], name: str, others: Mapping[tuple[str, str], EvaluatedSolution]
) -> dict[str, Any]:
    """The comparison on the solutions of one file that both judged."""
    common = [(row, other) for row in rows if (other := others.get((row.file, row.solution_id))) is not None]
    if not common:
        return {"judge": name, "solutions": 0}
    if any(row.gold != other.gold for row, other in common):
        raise UserError(f"judge-eval: --against: {name} was measured by another version of this package; run it again")
    pairs = [[row.judged(row.given) for row in side] for side in zip(*common, strict=True)]
    return {"judge": name, **compare(*pairs)}


def _solutions(file: recipe.Import, limit: int | None, quarantine: Path | None) -> list[ImportedSolution]:
    solutions = read_imports([file], quarantine=quarantine).solutions
    judged = [solution for solution in solutions if any(label is not None for label in solution.labels)]
    if not judged:
        raise UserError(f"{file.path}: expected solutions whose steps people judged, got none; choose another file")
    return judged[:limit]


def _as_seen_by_judge(solutions: Sequence[ImportedSolution], tokenizer: Path | None) -> list[Solution]:
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
    samples = judged_samples(solutions, Prompts.of(recipe.Prompt(), tokenizer))
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

"""How good a model is: pass@1, maj@k, and how often its right answers rest on wrong steps, each with a 95% interval."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_stepkto.errors import UserError
from megatron_stepkto.files import read_json, write_json
from megatron_stepkto.judging.answers import normalise
from megatron_stepkto.judging.equivalence import EquivalenceChecker
from megatron_stepkto.judging.stage import judge_file
from megatron_stepkto.recipe import Recipe
from megatron_stepkto.records import JudgedSample, Problem, read_records
from megatron_stepkto.sampling.draw import Drawing, Pass, read_prompts
from megatron_stepkto.sampling.job import Job

Z_95 = 1.959963984540054  # 97.5% quantile of the standard normal distribution
# Not the recipe's seed: all seeds of a recipe, and all its models, are measured with the same draws.
SEED = 0
Same = Callable[[str, str], bool]  # are two extracted answers equal?
Interval = tuple[float, float]


# --- proportions -----------------------------------------------------------------------------------------------


def wilson_interval(successes: float, trials: float) -> Interval:
    """95% interval of a proportion (Wilson 1927, as in Brown, Cai & DasGupta 2001, section 3.1.1)."""
    if trials <= 0 or not 0 <= successes <= trials:
        raise ValueError(f"expected 0 <= successes <= trials and trials > 0, got {successes} of {trials}")
    share, square = successes / trials, Z_95**2
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    half = Z_95 / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Share:
    """A share with its 95% interval, fractions of 1; both None where nothing was counted."""

    value: float | None
    interval: Interval | None


def clustered_share(clusters: Iterable[tuple[int, int]]) -> Share:
    """Sum of successes over sum of trials, where the trials of one cluster are alike (steps of one solution).

    The interval is Wilson's at the effective number of trials r (1 - r) / V, V the linearised variance of a
    ratio over n clusters of (s, m): n / (n - 1) * sum (s - r m)^2 / (sum m)^2 (Cochran 1977, section 6.3;
    Korn & Graubard 1998 for the effective number). It is at most the number of trials; where V is 0 (no
    success or nothing else) the clusters count, one trial each. With one trial per cluster V differs from
    the binomial variance by n / (n - 1) only: use ``plain_share``.

    Args:
        clusters: (successes, trials) of each; clusters without trials do not count.
    """
    counted = [(successes, trials) for successes, trials in clusters if trials]
    if not counted:
        return Share(None, None)
    num_clusters, total = len(counted), sum(trials for _, trials in counted)
    ratio = sum(successes for successes, _ in counted) / total
    effective = float(num_clusters)
    if num_clusters > 1:
        squares = sum((successes - ratio * trials) ** 2 for successes, trials in counted)
        variance = num_clusters / (num_clusters - 1) * squares / total**2
        if variance > 0:
            effective = min(ratio * (1 - ratio) / variance, float(total))
    return Share(ratio, wilson_interval(ratio * effective, effective))


def plain_share(flags: Iterable[bool]) -> Share:
    """The share of independent trials that succeed."""
    seen = list(flags)
    return Share(sum(seen) / len(seen), wilson_interval(sum(seen), len(seen))) if seen else Share(None, None)


# --- majority --------------------------------------------------------------------------------------------------


def majority_is_right(samples: Sequence[JudgedSample], same: Same) -> bool:
    """Is the most frequent answer right? A tie goes to the answer seen first.

    Answers vote by class: one normal form, or two that ``same`` calls equal. Solutions that state no answer
    and those whose answer could not be judged do not vote; without any vote the problem is not solved.
    """
    classes: list[_AnswerClass] = []
    for sample in samples:
        if sample.extracted_answer is None or sample.outcome is None:
            continue
        form = normalise(sample.extracted_answer)
        found = next((c for c in classes if c.holds(form, sample.outcome, same)), None)
        if found is None:
            found = _AnswerClass(form, sample.outcome)
            classes.append(found)
        found.votes += 1
    return bool(classes) and max(classes, key=lambda c: c.votes).outcome == 1


@dataclass
class _AnswerClass:
    form: str
    outcome: int
    votes: int = 0

    def holds(self, form: str, outcome: int, same: Same) -> bool:
        """All right answers equal the gold answer, so each other; a right and a wrong one differ."""
        if outcome != self.outcome:
            return False
        return outcome == 1 or form == self.form or same(self.form, form)


def answer_comparison(samples: Iterable[Sequence[JudgedSample]], checker: EquivalenceChecker) -> Same:
    """Decide every pair of wrong answers that ``majority_is_right`` may ask about, in one go.

    A pair that cannot be decided is two answers.
    """
    pairs: list[tuple[str, str]] = []
    for group in samples:
        wrong = [s.extracted_answer for s in group if s.outcome == 0 and s.extracted_answer is not None]
        forms = list(dict.fromkeys(map(normalise, wrong)))
        pairs += [(one, other) for i, one in enumerate(forms) for other in forms[i + 1 :]]
    verdicts = checker.check_many(pairs)
    equal = {pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.verdict == "right"}
    return lambda one, other: (one, other) in equal or (other, one) in equal


# --- one row of the table --------------------------------------------------------------------------------------


def evaluation_row(
    name: str,
    split: str,
    problems: Sequence[Problem],
    greedy: Sequence[JudgedSample],
    sampled: Sequence[JudgedSample],
    same: Same = lambda one, other: one == other,
) -> dict[str, Any]:
    """Metrics of one model: one greedy solution and k sampled ones per problem.

    pass@1 and the step errors are those of the greedy solutions; the same of the sampled ones stand under
    "sampled", with intervals over problems, because the k solutions of a problem are alike. Undecided
    answers count as not right in pass@1 and accuracy.

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
    reached = {
        **_measured("pass_at_1", plain_share(row.outcome == 1 for row in greedy)),
        **_measured("maj_at_k", plain_share(majority_is_right(group, same) for group in drawn.values())),
    }
    accuracy = clustered_share((sum(s.outcome == 1 for s in group), len(group)) for group in drawn.values())
    return {
        "name": name,
        "split": split,
        "num_problems": len(ids),
        "k": sizes.pop(),
        **reached,
        **_describe(list(first.values())),
        "sampled": {**_measured("accuracy", accuracy), **_describe(list(drawn.values()))},
    }


def _by_problem(ids: Sequence[str], samples: Sequence[JudgedSample], what: str) -> Mapping[str, list[JudgedSample]]:
    groups: dict[str, list[JudgedSample]] = {problem_id: [] for problem_id in ids}
    for sample in samples:
        if sample.problem_id not in groups:
            raise UserError(f"{what} sample {sample.sample_id} is of a problem that is not evaluated")
        groups[sample.problem_id].append(sample)
    return groups


def _measured(key: str, share: Share) -> dict[str, Any]:
    return {key: share.value, f"{key}_interval": None if share.interval is None else list(share.interval)}


def _describe(groups: Sequence[Sequence[JudgedSample]]) -> dict[str, Any]:
    """What is wrong inside right answers, and what solutions look like; one group per problem.

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
        **_measured("wrong_step_share_of_correct", share),
        **_measured("wrong_step_rate_in_correct", rate),
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


# --- the stage -------------------------------------------------------------------------------------------------


def evaluation_drawing(model: Path, name: str, problems: Path, recipe: Recipe, directory: Path) -> Drawing:
    """The solutions that an evaluation judges: one greedy and k sampled ones per problem.

    Raises:
        UserError: the recipe has no section evaluate or sample.
    """
    evaluation, sampling = recipe.evaluate, recipe.sample
    if evaluation is None or sampling is None:
        raise UserError(f"recipe {recipe.name}: evaluating needs the sections evaluate, sample and judge; add them")
    job = Job(
        model=model,
        model_name=name,
        passes=[
            Pass(name="greedy", num_samples=1, temperature=0, top_p=1),
            Pass(name="sampled", num_samples=evaluation.k, temperature=evaluation.temperature, top_p=evaluation.top_p),
        ],
        prompts=read_prompts(problems, recipe.prompt, model),
        # no log-probs, and chunks that do not depend on the K of training
        settings=sampling.model_copy(update={"gap_problems": 0, "num_samples": evaluation.k}),
        seed=SEED,
        directory=directory / "drawn",
    )
    return Drawing(job, f"{name}: solving {evaluation.split} problems", directory / "logs")


def evaluate_model(model: Path, name: str, problems: Path, recipe: Recipe, directory: Path) -> dict[str, Any]:
    """Draw, judge and measure; leaves greedy.jsonl, sampled.jsonl and metrics.json and returns the latter.

    Killed at any instant, the same call goes on where it stopped.

    Raises:
        UserError: the recipe has no section evaluate, sample or judge, or see ``Drawing`` and ``judge_file``.
    """
    evaluation, judging = recipe.evaluate, recipe.judge
    if evaluation is None or judging is None:
        raise UserError(f"recipe {recipe.name}: evaluating needs the sections evaluate, sample and judge; add them")
    drawn = directory / "drawn"
    if (directory / "metrics.json").is_file():  # written last; an earlier attempt was killed while tidying up
        shutil.rmtree(drawn, ignore_errors=True)
        return dict(read_json(directory / "metrics.json"))
    drawing = evaluation_drawing(model, name, problems, recipe, directory)
    drawing.draw()
    result = drawing.finish()
    judged: dict[str, list[JudgedSample]] = {}
    for pass_ in drawing.job.passes:
        path = directory / f"{pass_.name}.jsonl"
        judge_file(problems, result.paths[pass_.name], path, model, judging)
        judged[pass_.name] = list(read_records(path, JudgedSample))
    groups: dict[str, list[JudgedSample]] = {}
    for sample in judged["sampled"]:
        groups.setdefault(sample.problem_id, []).append(sample)
    with EquivalenceChecker(judging.workers, judging.timeout_s) as checker:
        same = answer_comparison(groups.values(), checker)
    row = evaluation_row(
        name, evaluation.split, list(read_records(problems, Problem)), judged["greedy"], judged["sampled"], same
    )
    write_json(directory / "metrics.json", row)
    shutil.rmtree(drawn, ignore_errors=True)  # the judged rows hold every sample
    return row


# --- the table -------------------------------------------------------------------------------------------------


def results_table(summary: Mapping[str, Any]) -> str:
    """The table that a run ends with: one line per model, with the methods compared where there are any.

    Args:
        summary: ``{"method", "iterations": [row, ...], "methods": {method: [row, ...]}}`` (the last optional).
    """
    groups: dict[str, Sequence[Mapping[str, Any]]] = {str(summary.get("method", "")): summary["iterations"]}
    groups.update(summary.get("methods") or {})
    rows = [row for group in groups.values() for row in group]
    ks = sorted({row["k"] for row in rows})
    table = Table(box=SIMPLE_HEAD, caption="[95% interval]; wrong steps: of the greedy solutions whose answer is right")
    if len(groups) > 1:
        table.add_column("method")
    table.add_column("model")
    maj = f"maj@{ks[0]}" if len(ks) == 1 else "maj@k"
    for heading in ("pass@1", maj, "right with a wrong step", "wrong steps in right", "n"):
        # wide enough for "100.0% [98.5, 100.0]": a cell must not break between value and interval
        table.add_column(heading, justify="right", min_width=20 if heading != "n" else None)
    for method, group in groups.items():
        for row in group:
            cells = [row["name"], *(_cell(row, key) for key in _COLUMNS), f"{row['num_problems']:,}"]
            table.add_row(*([method] if len(groups) > 1 else []), *cells)
        table.add_section()
    text = io.StringIO()
    Console(file=text, width=120, color_system=None, highlight=False, markup=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


_COLUMNS = ("pass_at_1", "maj_at_k", "wrong_step_share_of_correct", "wrong_step_rate_in_correct")


def _cell(row: Mapping[str, Any], key: str) -> str:
    """ "47.2% [44.1, 50.3]"; a dash where nothing was counted."""
    if row[key] is None:
        return "–"
    low, high = row[f"{key}_interval"]
    return f"{100 * row[key]:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"

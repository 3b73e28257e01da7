"""The dataset stage: the judged samples that a method trains on, and those that are held out."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.examples import ExampleWriter, writing_examples
from megatron_stepkto.base.files import stable_hash
from megatron_stepkto.base.progress import ProgressBar
from megatron_stepkto.base.records import JudgedSample, count_rows, read_records
from megatron_stepkto.judging.classes import SMALL_SHARE, check_both_classes, class_warnings
from megatron_stepkto.methods.method import Method
from megatron_stepkto.methods.registry import method_of
from megatron_stepkto.methods.select import Candidate, Candidates, Chosen, usable_right
from megatron_stepkto.recipe import keys as recipe


def build_dataset(
    judged: Path,
    train_out: Path,
    held_out: Path | None,
    settings: recipe.Dataset,
    method: str,
    held_out_share: float,
    seed: int,
    *,
    quarantine: Path | None = None,
    excluded: Path | None = None,
) -> dict[str, Any]:
    """Write training (and held-out) examples; returns counts, and ``warnings`` of data that teach little.

    A problem is held out or not by a hash of its id, so that the split is the same for every method and run. Samples
    are stored as they are read: in memory are a few hundred bytes of each.

    Args:
        train_out, held_out: folders of base/examples.py. Without an example that is held out there is no second one.
        excluded: a file of sample ids, one per line, that take no part.

    Raises:
        UserError: a bad row, an excluded sample that is not there, or nothing that the method can train on (with what
            was there instead), or only right or only wrong examples for a method that learns from the difference.
    """
    chosen = method_of(method)
    flipped = settings.flip_step_labels if "flip_step_labels" in chosen.dataset_keys else 0.0
    training: Candidates = {}
    held: dict[str, list[tuple[str, int]]] = {}
    seen: set[str] = set()
    too_long = 0
    left_out = read_ids(excluded) if excluded is not None else set()
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(writing_examples(train_out))
        held_writer = stack.enter_context(writing_examples(held_out)) if held_out is not None else None
        bar = stack.enter_context(ProgressBar("building the data set", count_rows(judged), "samples"))
        for sample in read_records(judged, JudgedSample, quarantine=quarantine):
            bar.update(len(seen))
            if sample.sample_id in seen:
                raise UserError(
                    f"{judged}: sample_id {sample.sample_id} is duplicated; a sample trains once, remove one"
                )
            seen.add(sample.sample_id)
            if sample.sample_id in left_out:
                continue
            if settings.max_tokens and len(sample.prompt_token_ids) + len(sample.token_ids) > settings.max_tokens:
                too_long += 1
            elif stable_hash("held out", sample.problem_id) / 2**64 < held_out_share:
                rows = held.setdefault(sample.problem_id, [])
                if held_writer is not None and is_judged(sample):
                    rows.append((sample.sample_id, store(held_writer, sample)))
            else:
                sample = with_flipped_labels(sample, flipped, seed)
                training.setdefault(sample.problem_id, []).append(candidate_of(sample, store(out, sample)))
        bar.update(len(seen))
        if unknown := sorted(left_out - seen):
            raise UserError(
                f"{excluded}: expected sample ids of {judged}, one per line, got {len(unknown)} that it does not have: "
                f"{', '.join(unknown[:5]):.200}; remove these lines"
            )
        examples = chosen.select(training, settings, seed)
        if not examples:
            outcomes = Counter(sample.outcome for samples in training.values() for sample in samples)
            others = f"; {too_long} more have over dataset.max_tokens tokens" if too_long else ""
            if kept_apart := sum(map(len, held.values())):
                others += f"; {kept_apart} more are held out (problems.held_out_share)"
            if left_out:
                others += f"; {len(left_out)} more are excluded (dataset.exclude)"
            raise UserError(
                f"{judged}: no example that {method} can train on: it needs {chosen.needs}; got {len(training)} "
                f"problems with {outcomes[1]} right, {outcomes[0]} wrong and {outcomes[None]} undecided "
                f"samples{others}; "
                + (
                    "raise dataset.max_tokens"
                    if too_long > outcomes.total()
                    else "sample more solutions of each problem (sample.num_samples), or problems nearer to what the "
                    "model can do"
                )
            )
        counts: dict[str, Any] = {
            "samples": len(seen),
            "too_long": too_long,
            "problems": len(training),
            "examples": len(examples),
            "right": sum(e.sample.outcome == 1 for e in examples),
            "wrong": sum(e.sample.outcome == 0 for e in examples),
            "steps_right": sum(e.sample.right_steps for e in examples),
            "steps_wrong": sum(e.sample.wrong_steps for e in examples),
            "kl_pairs": sum(e.partner is not None for e in examples),
            "tokens": sum(e.sample.prompt_tokens + e.sample.response_tokens for e in examples),
        }
        if left_out:
            counts["excluded"] = len(left_out)
        if not chosen.contrasts:
            counts |= _sides(training, settings)
        if warnings := _warnings(judged, chosen, counts):
            counts["warnings"] = warnings
        add_chosen(out, examples)
        if held_writer is not None and held:
            for name, row in (kept for rows in held.values() for kept in rows):
                held_writer.add_example(name, row, None, None, None)
            counts["held_out_problems"] = len(held)
            counts["held_out_examples"] = held_writer.examples.count
    return counts


def read_ids(path: Path) -> set[str]:
    """The ids in a file, one per line; blank lines and spaces around them are ignored."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return {line.strip() for line in lines} - {""}


def with_flipped_labels(sample: JudgedSample, share: float, seed: int) -> JudgedSample:
    """The sample as a judge that errs would have labelled it: each judged step's label is flipped with probability
    ``share``. The judged samples themselves keep the true labels, which figures are made of.

    A hash of seed, sample and step decides: a larger share flips the same labels and more.
    """
    if not share:
        return sample
    steps = [
        step.model_copy(update={"label": 1 - step.label})
        if step.label is not None and stable_hash(seed, "flip", sample.sample_id, number) / 2**64 < share
        else step
        for number, step in enumerate(sample.steps)
    ]
    return sample.model_copy(update={"steps": steps})


def is_judged(sample: JudgedSample) -> bool:
    return sample.outcome is not None or any(step.label is not None for step in sample.steps)


def store(writer: ExampleWriter, sample: JudgedSample) -> int:
    """Store the solution; returns its row."""
    return writer.add_sample(
        sample.sample_id,
        sample.problem_id,
        sample.prompt_token_ids,
        sample.token_ids,
        [step.token_end for step in sample.steps],
        [step.label for step in sample.steps],
        sample.outcome,
        sample.token_log_probs,
    )


def candidate_of(sample: JudgedSample, row: int) -> Candidate:
    """The sample without its text and tokens, which are stored in ``row``."""
    return Candidate(
        sample.sample_id,
        row,
        sample.outcome,
        sum(step.label == 1 for step in sample.steps),
        sum(step.label == 0 for step in sample.steps),
        len(sample.prompt_token_ids),
        len(sample.token_ids),
        hashlib.blake2b(np.array(sample.token_ids, np.int32).data, digest_size=16).digest(),
    )


def add_chosen(writer: ExampleWriter, examples: Iterable[Chosen]) -> None:
    for e in examples:
        partner = None if e.partner is None else e.partner.row
        writer.add_example(e.example_id, e.sample.row, partner, e.pair_id, e.side)


def _warnings(judged: Path, method: Method, counts: dict[str, Any]) -> list[str]:
    """Warnings: data that teach the method little.

    Raises:
        UserError: the method needs right and wrong, and has one of them only.
    """
    if not method.contrasts:
        useful = counts["problems_with_both"] + (0 if method.paired else counts["problems_right_only"])
        few = useful / counts["problems"] < SMALL_SHARE
        return [f"only {useful:,} of {counts['problems']:,} problems have {method.needs}"] if few else []
    read = counts if method.reads_steps else {**counts, "steps_right": 0, "steps_wrong": 0}
    right, wrong = (read[name] + read[f"steps_{name}"] for name in ("right", "wrong"))
    had = "{right:,} right and {wrong:,} wrong answers, {steps_right:,} right and {steps_wrong:,} wrong steps"
    check_both_classes(str(judged), method.name, right, wrong, had.format(**counts))
    found = class_warnings(read)
    if method.reads_steps and not counts["steps_right"] + counts["steps_wrong"]:
        found.append(f"no step is judged: {method.name} trains on answers alone")
    return found


def _sides(by_problem: Candidates, settings: recipe.Dataset) -> dict[str, int]:
    """Counts of problems with a usable right sample, a wrong one, both (only these give pairs) or neither."""
    found: Counter[str] = Counter(
        problems_with_both=0, problems_right_only=0, problems_wrong_only=0, problems_neither=0
    )
    unused = 0
    for samples in by_problem.values():
        right, wrong = bool(usable_right(samples, settings)), any(s.outcome == 0 for s in samples)
        kind = {(True, True): "with_both", (True, False): "right_only", (False, True): "wrong_only"}
        found[f"problems_{kind.get((right, wrong), 'neither')}"] += 1
        unused += sum(s.outcome == 1 for s in samples) - len(usable_right(samples, settings))
    return {**found, "right_with_wrong_step_left_out": unused}

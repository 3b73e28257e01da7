"""The dataset stage: the judged samples that a method trains on, and those that are held out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import stable_hash
from megatron_stepkto.base.records import JudgedSample, read_records, write_records
from megatron_stepkto.judging.classes import SMALL_SHARE, check_both_classes, class_warnings
from megatron_stepkto.methods.method import Method
from megatron_stepkto.methods.registry import method_of
from megatron_stepkto.methods.select import example_of, is_judged, usable_right
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
) -> dict[str, Any]:
    """Write training (and held-out) examples; returns counts, and ``warnings`` of data that teach little.

    A problem is held out or not by a hash of its id, so that the split is the same for every method and run.

    Raises:
        UserError: a bad row, or nothing that the method can train on (with what was there instead), or only right or
            only wrong examples for a method that learns from the difference.
    """
    chosen = method_of(method)
    by_problem: dict[str, list[JudgedSample]] = {}
    seen: set[str] = set()
    too_long = 0
    for sample in read_records(judged, JudgedSample, quarantine=quarantine):
        if sample.sample_id in seen:
            raise UserError(f"{judged}: sample_id {sample.sample_id} is duplicated; a sample trains once, remove one")
        seen.add(sample.sample_id)
        if settings.max_tokens and len(sample.prompt_token_ids) + len(sample.token_ids) > settings.max_tokens:
            too_long += 1
            continue
        by_problem.setdefault(sample.problem_id, []).append(sample)
    held = {problem for problem in by_problem if stable_hash("held out", problem) / 2**64 < held_out_share}
    training = {problem: samples for problem, samples in by_problem.items() if problem not in held}
    examples = chosen.select(training, settings, seed)
    if not examples:
        outcomes = Counter(sample.outcome for samples in training.values() for sample in samples)
        raise UserError(
            f"{judged}: no example that {method} can train on: it needs {chosen.needs}; got {len(training)} problems "
            f"with {outcomes[1]} right, {outcomes[0]} wrong and {outcomes[None]} undecided samples; "
            "sample more solutions of each problem (sample.num_samples), or problems nearer to what the model can do"
        )
    counts: dict[str, Any] = {
        "samples": len(seen),
        "too_long": too_long,
        "problems": len(training),
        "examples": len(examples),
        "right": sum(e.outcome == 1 for e in examples),
        "wrong": sum(e.outcome == 0 for e in examples),
        "steps_right": sum(s.label == 1 for e in examples for s in e.steps),
        "steps_wrong": sum(s.label == 0 for e in examples for s in e.steps),
        "kl_pairs": sum(e.kl_partner is not None for e in examples),
        "tokens": sum(len(e.prompt_token_ids) + len(e.token_ids) for e in examples),
    }
    if not chosen.contrasts:
        counts |= _sides(training, settings)
    if warnings := _warnings(judged, chosen, counts):
        counts["warnings"] = warnings
    write_records(train_out, examples)
    if held_out is not None and held:
        kept = [example_of(s) for p in by_problem if p in held for s in by_problem[p] if is_judged(s)]
        counts["held_out_problems"] = len(held)
        counts["held_out_examples"] = write_records(held_out, kept) if kept else 0
    return counts


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


def _sides(by_problem: dict[str, list[JudgedSample]], settings: recipe.Dataset) -> dict[str, int]:
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

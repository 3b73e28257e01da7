"""What the methods select with: single samples, pairs, and the KL partner of each example."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import stable_hash
from megatron_stepkto.base.records import JudgedSample, KLPartner, TrainExample, TrainStep
from megatron_stepkto.recipe import keys as recipe


def single_examples(
    chosen: dict[str, list[JudgedSample]], settings: recipe.Dataset, seed: int, *, kl_pairs: bool
) -> list[TrainExample]:
    """One example per chosen sample, at most ``max_examples_per_problem`` of a problem.

    Args:
        chosen: samples by problem. kl_pairs: whether the loss reads a KL partner beside each.
    """
    limit = settings.max_examples_per_problem
    if limit:
        chosen = {
            p: _rng(seed, p).sample(samples, limit) if len(samples) > limit else samples
            for p, samples in chosen.items()
        }
    chosen = {problem: samples for problem, samples in chosen.items() if samples}
    partners = _kl_partners(chosen, settings, seed) if kl_pairs else {}
    return [example_of(s, kl_partner=partners.get(s.sample_id)) for samples in chosen.values() for s in samples]


def pair_examples(by_problem: dict[str, list[JudgedSample]], settings: recipe.Dataset, seed: int) -> list[TrainExample]:
    """Two examples per pair of a right and a wrong sample of one problem, chosen and rejected."""
    return [example for problem, samples in by_problem.items() for example in _pairs(problem, samples, settings, seed)]


def with_outcome(by_problem: dict[str, list[JudgedSample]]) -> dict[str, list[JudgedSample]]:
    """The samples with a judged outcome."""
    return {problem: [s for s in samples if s.outcome is not None] for problem, samples in by_problem.items()}


def is_judged(sample: JudgedSample) -> bool:
    return sample.outcome is not None or any(step.label is not None for step in sample.steps)


def usable_right(samples: Iterable[JudgedSample], settings: recipe.Dataset) -> list[JudgedSample]:
    """Right samples; with ``right_solutions: no_wrong_step`` only those without a step judged wrong.

    The others are not wrong samples either: their answer is right.
    """
    any_step = settings.right_solutions == "any"
    return [s for s in samples if s.outcome == 1 and (any_step or all(step.label != 0 for step in s.steps))]


def _rng(*parts: object) -> random.Random:
    return random.Random(stable_hash(*parts))


def distinct(samples: Iterable[JudgedSample]) -> list[JudgedSample]:
    found: dict[tuple[int, ...], JudgedSample] = {}
    for sample in samples:
        found.setdefault(tuple(sample.token_ids), sample)
    return list(found.values())


def _kl_partners(chosen: dict[str, list[JudgedSample]], settings: recipe.Dataset, seed: int) -> dict[str, KLPartner]:
    """(x_i, y_j) with y_j a solution of the next problem, rotated: no solution is paired with its own problem.

    A partner that would make the pair longer than ``max_tokens`` gives way to the next one. Where none fits, the
    sample has no pair.
    """
    share, limit = settings.kl_pair_share, settings.max_tokens
    if share == 0 or not chosen:
        return {}
    problems = list(chosen)
    if len(problems) < 2:
        raise UserError(
            "KL pairs need at least two problems; got one. Give more problems, or set "
            "train.loss.reference_point to none and dataset.kl_pair_share to 0"
        )
    partners = {}
    for number, problem in enumerate(problems):
        others = chosen[problems[(number + 1) % len(problems)]]
        for index, sample in enumerate(chosen[problem]):
            if stable_hash(seed, "kl", sample.sample_id) / 2**64 < share:
                rotated = (others[(index + shift) % len(others)] for shift in range(len(others)))
                prompt = len(sample.prompt_token_ids)
                other = next((o for o in rotated if not limit or prompt + len(o.token_ids) <= limit), None)
                if other is not None:
                    partners[sample.sample_id] = KLPartner(
                        example_id=other.sample_id, token_ids=other.token_ids, steps=_steps(other)
                    )
    return partners


def _pairs(problem: str, samples: list[JudgedSample], settings: recipe.Dataset, seed: int) -> list[TrainExample]:
    rng = _rng(seed, "pairs", problem)
    right = usable_right(samples, settings)
    wrong = [s for s in samples if s.outcome == 0]
    rng.shuffle(right)
    rng.shuffle(wrong)
    examples = []
    if right and wrong:
        for number in range(min(settings.pairs_per_problem, max(len(right), len(wrong)))):
            pair = f"{problem}/pair/{number}"
            for side, sample in (("chosen", right[number % len(right)]), ("rejected", wrong[number % len(wrong)])):
                examples.append(example_of(sample, example_id=f"{pair}/{side}", pair_id=pair, side=side))
    return examples


def _steps(sample: JudgedSample) -> list[TrainStep]:
    return [TrainStep(token_start=s.token_start, token_end=s.token_end, label=s.label) for s in sample.steps]


def example_of(sample: JudgedSample, **extra: Any) -> TrainExample:
    return TrainExample(
        **{
            "example_id": sample.sample_id,
            "problem_id": sample.problem_id,
            "prompt_token_ids": sample.prompt_token_ids,
            "token_ids": sample.token_ids,
            "steps": _steps(sample),
            "outcome": sample.outcome,
            "token_log_probs": sample.token_log_probs,
            **extra,
        }
    )

"""What the methods select with: single samples, pairs, and the KL partner of each example."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import stable_hash
from megatron_stepkto.recipe import keys as recipe


@dataclass(frozen=True, slots=True)
class Candidate:
    """A judged sample as the methods see it: without text and tokens, so that all of a data set fit in memory.

    row: of the stored solution. right_steps, wrong_steps: numbers of judged ones. response: digest of the response's
    tokens, equal for equal ones.
    """

    sample_id: str
    row: int
    outcome: int | None
    right_steps: int
    wrong_steps: int
    prompt_tokens: int
    response_tokens: int
    response: bytes

    @property
    def is_judged(self) -> bool:
        return self.outcome is not None or self.right_steps + self.wrong_steps > 0


@dataclass(frozen=True, slots=True)
class Chosen:
    """A candidate that trains: alone, perhaps with a KL partner, or as one side (chosen, rejected) of a pair."""

    sample: Candidate
    partner: Candidate | None = None
    pair_id: str | None = None
    side: str | None = None

    @property
    def example_id(self) -> str:
        return self.sample.sample_id if self.pair_id is None else f"{self.pair_id}/{self.side}"


Candidates = dict[str, list[Candidate]]  # by problem


def single_examples(chosen: Candidates, settings: recipe.Dataset, seed: int, *, kl_pairs: bool) -> list[Chosen]:
    """One example per chosen sample, as far as ``wrong_per_right`` and ``max_examples_per_problem`` allow.

    Args:
        chosen: samples by problem. kl_pairs: whether the loss reads a KL partner beside each.
    """
    if settings.wrong_per_right is not None:
        chosen = {
            p: _balanced(samples, settings.wrong_per_right, _rng(seed, "wrong", p)) for p, samples in chosen.items()
        }
    limit = settings.max_examples_per_problem
    if limit:
        chosen = {
            p: _rng(seed, p).sample(samples, limit) if len(samples) > limit else samples
            for p, samples in chosen.items()
        }
    chosen = {problem: samples for problem, samples in chosen.items() if samples}
    partners = _kl_partners(chosen, settings, seed) if kl_pairs else {}
    return [Chosen(s, partners.get(s.sample_id)) for samples in chosen.values() for s in samples]


def _balanced(samples: list[Candidate], wrong_per_right: float, rng: random.Random) -> list[Candidate]:
    """Samples of one problem, with at most so many wrong ones for each right one, drawn at random.

    Where a loss pushes every wrong solution of a hard problem away and pulls none, it teaches little of what is right
    there (the advantage of such a group is 0 in GRPO; DAPO, arXiv 2503.14476, leaves it out).
    """
    wrong = [s for s in samples if s.outcome == 0]
    most = math.floor(wrong_per_right * sum(s.outcome == 1 for s in samples))
    if len(wrong) <= most:
        return samples
    kept = {s.sample_id for s in rng.sample(wrong, most)}
    return [s for s in samples if s.outcome != 0 or s.sample_id in kept]


def pair_examples(by_problem: Candidates, settings: recipe.Dataset, seed: int) -> list[Chosen]:
    """Two examples per pair of a right and a wrong sample of one problem, chosen and rejected."""
    examples = []
    for problem, samples in by_problem.items():
        rng = _rng(seed, "pairs", problem)
        right = usable_right(samples, settings)
        wrong = [s for s in samples if s.outcome == 0]
        rng.shuffle(right)
        rng.shuffle(wrong)
        pairs = min(settings.pairs_per_problem, max(len(right), len(wrong))) if right and wrong else 0
        for number in range(pairs):
            pair = f"{problem}/pair/{number}"
            examples.append(Chosen(right[number % len(right)], pair_id=pair, side="chosen"))
            examples.append(Chosen(wrong[number % len(wrong)], pair_id=pair, side="rejected"))
    return examples


def with_outcome(by_problem: Candidates) -> Candidates:
    return {problem: [s for s in samples if s.outcome is not None] for problem, samples in by_problem.items()}


def usable_right(samples: Iterable[Candidate], settings: recipe.Dataset) -> list[Candidate]:
    """Right samples; with ``right_solutions: no_wrong_step`` only those without a step judged wrong.

    The others are not wrong samples either: their answer is right.
    """
    any_step = settings.right_solutions == "any"
    return [s for s in samples if s.outcome == 1 and (any_step or not s.wrong_steps)]


def distinct(samples: Iterable[Candidate]) -> list[Candidate]:
    found: dict[bytes, Candidate] = {}
    for sample in samples:
        found.setdefault(sample.response, sample)
    return list(found.values())


def _rng(*parts: object) -> random.Random:
    return random.Random(stable_hash(*parts))


def _kl_partners(chosen: Candidates, settings: recipe.Dataset, seed: int) -> dict[str, Candidate]:
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
                other = next(
                    (o for o in rotated if not limit or sample.prompt_tokens + o.response_tokens <= limit), None
                )
                if other is not None:
                    partners[sample.sample_id] = other
    return partners

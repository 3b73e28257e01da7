"""How fast answers are checked: the exact path on one core, and 20,000 samples through the judge's pool.

python benchmarks/answer_checking.py DATA_FOLDER [--workers 2]

Pairs are real: GSM8K model solutions against their answers, and MATH-500 golds against their own and the next
problem's. Rates are medians of five passes with empty caches. The gold answers of MATH-500 that the exact path does
not decide go to math-verify in the last figure, which repeats the pairs up to 20,000 with a distinct spelling each, so
that none is decided only once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

from megatron_stepkto.answers import exact, units
from megatron_stepkto.answers.equivalence import EquivalenceChecker
from megatron_stepkto.answers.final_answer import extract_answer
from megatron_stepkto.answers.text import normalise

PASSES = 5


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.open()]


def rate(pairs: list[tuple[str, str]]) -> float:
    """Pairs per second of one core, extraction from the whole solution included."""
    seconds = []
    for _ in range(PASSES):
        normalise.cache_clear()
        units.unit_of.cache_clear()
        begun = time.perf_counter()
        for gold, solution in pairs:
            exact.compare(gold, extract_answer(solution) or "")
        seconds.append(time.perf_counter() - begun)
    return len(pairs) / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    gsm8k = read(arguments.data / "samples/gsm8k_model_solutions.jsonl")
    math500 = read(arguments.data / "eval/math500.jsonl")
    for name, rows, key in (("GSM8K", gsm8k, "response"), ("MATH-500", math500, "solution")):
        per_second = rate([(row["answer"], row[key]) for row in rows])
        print(f"exact path, {name} solutions: {per_second:,.0f} per second and core")
    golds = [row["answer"] for row in math500]
    pairs = [(row["answer"], extract_answer(row["response"]) or "") for row in gsm8k]
    pairs += list(itertools.pairwise(golds))
    many = [(gold, answer + " " * (number // len(pairs))) for number in range(20_000)
            for gold, answer in [pairs[number % len(pairs)]]]  # fmt: skip
    with EquivalenceChecker(arguments.workers, 3.0) as checker:
        begun = time.perf_counter()
        verdicts = checker.check_many(many)
        seconds = time.perf_counter() - begun
    computed = sum(v.how != "exact" for v in verdicts)
    print(f"20,000 samples, {arguments.workers} workers: {seconds:.1f} s ({computed:,} by computer algebra)")


if __name__ == "__main__":
    main()

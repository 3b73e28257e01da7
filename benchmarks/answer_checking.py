"""How fast answers are checked: the exact path on one core, and 20,000 samples through the judge's pool.

python benchmarks/answer_checking.py DATA_FOLDER [--workers 2]
python -m benchmarks.answer_checking --pairs [FILE]

The second counts false labels by kind over the pairs of tests/unit/answers/answer_pairs.txt, or of another file in its
layout.

Pairs are real: GSM8K model solutions against their answers, and MATH-500 golds against their own and the next
problem's. Rates are medians of five passes with empty caches. The gold answers of MATH-500 that the exact path does
not decide go to math-verify in the last figure, which repeats the pairs up to 20,000 with a distinct spelling each, so
that none is decided only once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import time
from collections import Counter
from pathlib import Path

from megatron_stepkto.answers import exact, units
from megatron_stepkto.answers.equivalence import EquivalenceChecker
from megatron_stepkto.answers.final_answer import extract_answer
from megatron_stepkto.answers.text import normalise

PASSES = 5
PAIRS = Path(__file__).parent.parent / "tests/unit/answers/answer_pairs.txt"
EXPECTED = {"==": "right", "!=": "wrong", "=?": "undecided", "!?": "undecided", "??": "undecided"}


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.open()]


def read_pairs(path: Path) -> dict[str, list[tuple[str, str, str]]]:
    """(gold, sign, answer) by kind; the file's head explains the signs."""
    kinds: dict[str, list[tuple[str, str, str]]] = {}
    pairs: list[tuple[str, str, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"\[([a-z ]+)\]", line):
            pairs = kinds.setdefault(heading[1], [])
        elif line and not line.startswith("#"):
            gold, sign, answer = re.split(r" (==|!=|=\?|!\?|\?\?) ", line, maxsplit=1)
            pairs.append((gold, sign, answer))
    return kinds


def count_false_labels(path: Path, workers: int) -> None:
    """A table by kind: unequal pairs called right, equal ones called wrong, and what is undecided."""
    print("| kind | pairs | right for different | wrong for equal | label where nobody can tell | undecided |")
    print("| --- | --- | --- | --- | --- | --- |")
    with EquivalenceChecker(workers, 5.0) as checker:
        total: Counter[str] = Counter()
        for kind, pairs in read_pairs(path).items():
            verdicts = checker.check_many([(gold, answer) for gold, _, answer in pairs])
            found = Counter(
                f"{sign[0]}{verdict.verdict}" for (_, sign, _), verdict in zip(pairs, verdicts, strict=True)
            )
            found["undecided"] = sum(verdict.verdict == "undecided" for verdict in verdicts)
            found["labelled"] = found["?right"] + found["?wrong"]
            found["pairs"] = len(pairs)
            total += found
            print(_row(kind, found))
        print(_row("all", total))


def _row(kind: str, found: Counter[str]) -> str:
    cells = [found[key] for key in ("pairs", "!right", "=wrong", "labelled", "undecided")]
    return f"| {kind} | {' | '.join(map(str, cells))} |"


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
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--pairs", type=Path, nargs="?", const=PAIRS)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.pairs:
        count_false_labels(arguments.pairs, arguments.workers)
        return
    if arguments.data is None:
        parser.error("expected DATA_FOLDER or --pairs")
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

"""What the equations rule says of solutions that are right: MATH's and GSM8K's own, and models' with a right answer.

    python -m benchmarks.rule_on_gold DATA          # the folder that holds problems/, eval/ and samples/

Prints steps, labels and every step called wrong: each is a slip of the solution's author, or a fault of the rule.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from megatron_stepkto.base.records import Label
from megatron_stepkto.judging.process.rules import RULES
from megatron_stepkto.steps.text import SplitRule, split_text

FILES: tuple[tuple[str, str, SplitRule], ...] = (
    ("problems/math_train_part.jsonl", "solution", "sentence"),
    ("eval/math500.jsonl", "solution", "sentence"),
    ("problems/gsm8k_train.jsonl", "solution", "line"),
    ("eval/gsm8k_test.jsonl", "solution", "line"),
    ("samples/gsm8k_model_solutions.jsonl", "response", "line"),
)


def measure(path: Path, key: str, how: SplitRule) -> tuple[Counter[Label], list[str]]:
    """Labels of all steps of the solutions with a right answer, and the text of each step labelled 0."""
    counts: Counter[Label] = Counter()
    wrong: list[str] = []
    for number, line in enumerate(path.open(), 1):
        row = json.loads(line)
        if not row.get("correct", True):
            continue
        spans = split_text(row[key], how)
        for (start, end), label in zip(spans, RULES["equations"](row["problem"], row[key], spans), strict=True):
            counts[label] += 1
            if label == 0:
                wrong.append(f"{path.name}:{number}: {row[key][start:end].strip()}")
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data
    print("| file | steps | judged, % | right | wrong |\n| --- | --- | --- | --- | --- |")
    found = []
    for name, key, how in FILES:
        counts, wrong = measure(data / name, key, how)
        judged = 100 * (counts[0] + counts[1]) / counts.total()
        print(f"| {Path(name).name} | {counts.total()} | {judged:.1f} | {counts[1]} | {counts[0]} |")
        found += wrong
    print("\nCalled wrong:", *found, sep="\n")


if __name__ == "__main__":
    main()

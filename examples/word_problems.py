"""Prepare the data of recipes/smollm2_135m_word_problems_cpu.yaml: arithmetic word problems of one or two steps.

    python examples/word_problems.py DATA OUT

DATA holds problems/mawps_asdiv_train.jsonl, problems/gsm8k_train.jsonl, eval/svamp.jsonl and eval/gsm8k_test.jsonl:
rows with ``problem``, ``answer`` and ``solution``. OUT gets:

- train.jsonl  MAWPS and ASDiv, each text once, without those of which the set gives two answers
- dev.jsonl    300 of them that do not train, to choose settings on
- sft.jsonl    train.jsonl, and GSM8K's training problems of at most two annotated operations
- svamp.jsonl  to measure on
- gsm8k_two_steps.jsonl  GSM8K's test problems of at most two operations, to measure on
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from megatron_stepkto.base.records import Problem, read_rows, write_records
from megatron_stepkto.problems.datasets import to_problem

DEV, MAX_OPERATIONS = 300, 2


def distinct(problems: list[Problem]) -> list[Problem]:
    """Each text once, in order; a text with several answers not at all."""
    answers: dict[str, set[str | None]] = {}
    for problem in problems:
        answers.setdefault(_text(problem), set()).add(problem.answer)
    first = {_text(problem): problem for problem in reversed(problems)}
    return [p for p in problems if first[_text(p)] is p and len(answers[_text(p)]) == 1]


def _text(problem: Problem) -> str:
    return " ".join(problem.problem.casefold().split())


def is_short(problem: Problem) -> bool:
    return problem.solution is not None and 1 <= problem.solution.count("<<") <= MAX_OPERATIONS


def prepare(data: Path, out: Path) -> dict[str, int]:
    """Writes the files; returns their numbers of problems."""
    words = distinct(list(read_rows(data / "problems" / "mawps_asdiv_train.jsonl", to_problem)))
    random.Random("word problems").shuffle(words)
    dev, train = words[:DEV], words[DEV:]
    gsm8k, gsm8k_test = (
        [problem for problem in read_rows(data / name, to_problem) if is_short(problem)]
        for name in ("problems/gsm8k_train.jsonl", "eval/gsm8k_test.jsonl")
    )
    svamp = list(read_rows(data / "eval" / "svamp.jsonl", to_problem))
    files = {
        "train": train,
        "dev": dev,
        "sft": [*train, *distinct(gsm8k)],
        "svamp": svamp,
        "gsm8k_two_steps": gsm8k_test,
    }
    out.mkdir(parents=True, exist_ok=True)
    return {name: write_records(out / f"{name}.jsonl", problems) for name, problems in files.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("out", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    print(prepare(arguments.data, arguments.out))

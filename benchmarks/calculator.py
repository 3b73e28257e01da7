"""What a model would solve with a calculator: its greedy solutions in GSM8K's form, each operation computed again.

    python -m benchmarks.calculator runs/NAME/evaluate/M0 runs/NAME/evaluate/M1 ...

``<<48/2=23>>`` is computed as 24, and so is 23 where a later operation uses it. A solution that is right then chose the
right operations on the right numbers; what it lacks is arithmetic. Prints pass@1 as it is, with the calculator, and the
share of solutions with an operation whose result is wrong.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from megatron_stepkto.base.records import JudgedSample, Problem, read_records
from megatron_stepkto.judging.formula_parser import parse
from megatron_stepkto.judging.formula_tokens import tokenize
from megatron_stepkto.judging.formula_values import Scope, Unreadable

OPERATION = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
CENT = Fraction(1, 100)  # what results are rounded to


def value_of(text: str) -> Fraction | None:
    try:
        value = parse(tokenize(text), plain=True).value(Scope())
    except Unreadable:
        return None
    return value if isinstance(value, Fraction) else None


def operations(text: str) -> Iterator[tuple[Fraction | None, bool]]:
    """(Its value by a calculator, whether the result written is that of the numbers written) of each operation."""
    corrected: dict[str, Fraction] = {}  # a written result -> what it should have been
    for expression, written in OPERATION.findall(text):
        exact = value_of(NUMBER.sub(lambda number: f"({corrected.get(number[0], number[0])})", expression))
        ours, theirs = value_of(expression), value_of(written)
        if exact is not None:
            corrected[written.strip()] = exact
        yield exact, ours is None or (theirs is not None and abs(ours - theirs) < CENT)


def shares(evaluation: Path) -> tuple[float, float, float]:
    """(pass@1, pass@1 with a calculator, share of solutions with a wrong result)."""
    problems = read_records(evaluation.parent / "problems" / "problems.jsonl", Problem)
    answers = {problem.problem_id: value_of(problem.answer or "") for problem in problems}
    rows = list(read_records(evaluation / "greedy.jsonl", JudgedSample))
    right = with_calculator = wrong_results = 0
    for row in rows:
        found = list(operations(row.text))
        last, answer = found[-1][0] if found else None, answers[row.problem_id]
        right += row.outcome == 1
        with_calculator += last is not None and answer is not None and abs(last - answer) < CENT
        wrong_results += not all(true for _, true in found)
    return right / len(rows), with_calculator / len(rows), wrong_results / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluations", nargs="+", type=Path, help="folders of a run: evaluate/M0, evaluate/M1, ...")
    for evaluation in parser.parse_args().evaluations:
        right, with_calculator, wrong_results = shares(evaluation)
        print(f"{evaluation}: {right:.1%} right, {with_calculator:.1%} with a calculator; {wrong_results:.1%} of the "
              "solutions have a wrong result")  # fmt: skip


if __name__ == "__main__":
    main()

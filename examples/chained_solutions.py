"""Write the solutions that recipes/smollm2_135m_chained_cpu.yaml trains M0 on: right answers, often with wrong steps.

    python examples/chained_solutions.py OUT

OUT gets one JSON line for each of 3,200 chained problems: the simulated student's solution, of which only those with
the right answer are kept. So a check of the answers alone would choose them, and 43 in 100 have a wrong step.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from megatron_stepkto.base.records import Problem, write_records
from megatron_stepkto.problems.chained_arithmetic.generate import answer_line
from megatron_stepkto.problems.chained_arithmetic.student import corpus

SOLUTIONS = 3200


def right_solutions() -> list[Problem]:
    """The first ``SOLUTIONS`` problems whose answer the student finds (it finds 56%), each with its solution."""
    right = (
        problem.model_copy(update={"solution": text})
        for problem, text in corpus(2 * SOLUTIONS, seed=0)
        if problem.answer is not None and text.endswith(answer_line(int(problem.answer)))
    )
    return list(itertools.islice(right, SOLUTIONS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path)
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{write_records(out, right_solutions())} solutions in {out}")

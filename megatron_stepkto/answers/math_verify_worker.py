"""A process that compares answers with math-verify until it is killed; EquivalenceChecker starts it.

Reads one JSON object {"gold", "answer"} per line and writes one {"verdict", "how", "milliseconds"}; the first
line it writes is {"ready": true}. math-verify's own time limit returns False, which would turn a slow
machine into wrong labels. Here a timer of the process's own CPU time (ITIMER_PROF) runs during each pair and
its signal ends the process, also inside C code: how hard a pair is does not depend on what else the machine
does. The parent reads the signal as a time-out.

Usage: python -m megatron_stepkto.answers.math_verify_worker PARENT_PID CPU_SECONDS
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import resource
import signal
import sys
import time
from typing import Any

from megatron_stepkto.answers.text import unwrap

PR_SET_PDEATHSIG = 1
MEMORY_BYTES = 1 << 30
TINY, SAME = 1e-3, 1e-6
_DELIMITERS = ("\\boxed", "$", "\\[", "\\(")
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}|[^\x00-\x7f]|[€$£]")
_UPRIGHT = re.compile(r"\\mathrm\s*\{\s*([a-zA-Z])\s*\}")


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _parse(answer: str) -> list[Any]:
    """What math-verify reads: the answer as one box (a bare string loses its LaTeX), else as prose.

    A formula that does not parse is not read as prose, which would pick some number out of it.
    """
    from math_verify import LatexExtractionConfig, parse

    # a group inside a fraction ends its reading: 1 - \\frac{1}{\\mathrm{e}} would be 1
    answer = _UPRIGHT.sub(r"\1", unwrap(answer.strip()))
    found: list[Any] = []
    if not any(mark in answer for mark in _DELIMITERS):
        found = parse(f"\\boxed{{{answer}}}", [LatexExtractionConfig()], parsing_timeout=None)
        if any(not isinstance(item, str) for item in found):
            return found
        if not _PROSE.search(answer):
            return _parse(answer.rpartition("=")[2]) if "=" in answer else found  # 17 \\bmod 5 = 2
    return list(parse(answer, parsing_timeout=None)) or found


def _differ_when_tiny(gold: list[Any], answer: list[Any]) -> bool:
    """math-verify compares numbers to six decimals, so 1/2^99 and 1/2^98, near zero, are equal to it."""
    from sympy import Expr  # type: ignore[import-untyped]

    numbers = [next((i for i in items if isinstance(i, Expr) and i.is_number), None) for items in (gold, answer)]
    if None in numbers:
        return False
    a, b = (number.doit().evalf(30) for number in numbers if number is not None)
    if not a.is_comparable or not b.is_comparable:  # complex, or a percentage kept as a product
        return False
    size = max(abs(a), abs(b))
    return bool(size < TINY and abs(a - b) > SAME * size)


def _is_interval(items: list[Any]) -> bool:
    from sympy import Interval, Union

    return any(isinstance(item, Interval | Union) for item in items)


def compare(gold: str, answer: str) -> tuple[str, str]:
    """(verdict, how) of one pair."""
    from math_verify import verify

    golds, answers = _parse(gold), _parse(answer)
    if not golds or not answers:
        return "undecided", "unparsed"
    # verify takes an inequality for an interval on one side only
    swapped = _is_interval(golds) and not _is_interval(answers)
    if verify(golds, answers, timeout_seconds=None) or (swapped and verify(answers, golds, timeout_seconds=None)):
        return ("wrong" if _differ_when_tiny(golds, answers) else "right"), "math-verify"
    if all(isinstance(item, str) for item in golds) or all(isinstance(item, str) for item in answers):
        return "undecided", "unparsed"
    return "wrong", "math-verify"


def main() -> None:
    _die_with_parent(int(sys.argv[1]))
    cpu_seconds = float(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # whatever the libraries print must not mix with the answers
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    compare("x", "y")  # imports everything and fills the parser's tables
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        pair, begun = json.loads(line), time.process_time()
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            verdict, how = compare(pair["gold"], pair["answer"])
        except Exception as error:  # whatever fails in there is "undecided", and its name is kept
            verdict, how = "undecided", f"failed: {type(error).__name__}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        milliseconds = (time.process_time() - begun) * 1000
        print(json.dumps({"verdict": verdict, "how": how, "milliseconds": milliseconds}), file=replies, flush=True)


if __name__ == "__main__":
    main()

"""A process that compares answers with math-verify until it is killed; EquivalenceChecker starts it.

Reads one JSON object {"gold", "answer"} per line and writes one {"verdict", "how"}; the first line it writes
is {"ready": true}. It sets no time limit of its own (math-verify's returns False, which would turn a slow
machine into wrong labels): the parent kills it.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG = 1
MEMORY_BYTES = 2 << 30
TINY, SAME = 1e-3, 1e-6
_DELIMITERS = ("\\boxed", "$", "\\[", "\\(")


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _parse(answer: str) -> list[Any]:
    """What math-verify reads: the answer as one box (a bare string loses its LaTeX), else as prose."""
    from math_verify import parse

    delimited = any(mark in answer for mark in _DELIMITERS)
    boxed = [] if delimited else parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    if any(not isinstance(item, str) for item in boxed):
        return list(boxed)
    return list(parse(answer, parsing_timeout=None)) or list(boxed)


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


def compare(gold: str, answer: str) -> tuple[str, str]:
    """(verdict, how) of one pair."""
    from math_verify import verify

    golds, answers = _parse(gold), _parse(answer)
    if not golds or not answers:
        return "undecided", "unparsed"
    if verify(golds, answers, timeout_seconds=None):
        return ("wrong" if _differ_when_tiny(golds, answers) else "right"), "math-verify"
    if all(isinstance(item, str) for item in golds) or all(isinstance(item, str) for item in answers):
        return "undecided", "unparsed"
    return "wrong", "math-verify"


def main() -> None:
    _die_with_parent(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # whatever the libraries print must not mix with the answers
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    compare("x", "y")  # imports everything and fills the parser's tables
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        pair = json.loads(line)
        try:
            verdict, how = compare(pair["gold"], pair["answer"])
        except Exception as error:  # whatever fails in there is "undecided", and its name is kept
            verdict, how = "undecided", f"failed: {type(error).__name__}"
        print(json.dumps({"verdict": verdict, "how": how}), file=replies, flush=True)


if __name__ == "__main__":
    main()

"""A process that compares answers by computer algebra until it is killed; EquivalenceChecker starts it.

Reads one JSON object {"gold", "answer"} per line and writes one {"verdict", "how", "milliseconds"}; the first
line it writes is {"ready": true}. math-verify's own time limit returns False, so a slow machine would give wrong
labels. Here a timer of the process's CPU time (ITIMER_PROF) runs during each pair, and its signal ends the process,
even inside C code: the limit does not depend on the machine's load. The parent reports the signal as a time-out.

Usage: python -m megatron_stepkto.answers.math_verify_worker PARENT_PID CPU_SECONDS
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import sys
import time
from fractions import Fraction

from megatron_stepkto.answers.choices import without_choice
from megatron_stepkto.answers.reading import Assigned, Form, Scalar, Unreadable, read
from megatron_stepkto.answers.text import unescape
from megatron_stepkto.answers.units import unit_of
from megatron_stepkto.base.processes import die_with_parent

MEMORY_BYTES = 1 << 30
CHARS_AROUND = 50  # around a value in a sentence; a word of comparison there makes it unreadable
HOW = "math-verify"
_WORDS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}|[^\x00-\x7f]|[€$£]")
_COMPARES = re.compile(
    r"\b(?:less|more|greater|smaller|than|least|most|between|or|about|nearly|almost|except|from|to|if|unless)\b", re.I
)
_DENIED = re.compile(r"\bnot\s+(?:it'?s\s+not\s+)?\S+", re.IGNORECASE)
_ONE = r"\frac{1}{1}"
_NAMED_FACTORS = {"share": r"\frac{1}{100}", "angle": r"\frac{\pi}{180}"}


def _read(answer: str) -> tuple[Form, bool]:
    """The form of an answer, or of the value that a sentence states; and whether the value was searched for.

    math-verify finds that value. A formula that cannot be read is not searched: one of its numbers must not count as
    the whole.

    Raises:
        Unreadable: neither can be read.
    """
    from math_verify import parse

    try:
        return read(answer), False
    except Unreadable:
        if not _WORDS.search(answer):
            raise
    found = parse(_DENIED.sub("", unescape(answer)), parsing_timeout=None)
    if not found or not isinstance(found[-1], str):
        raise Unreadable("no value in the sentence")
    before, value, after = re.sub(r"\s*\{\s*,\s*\}", ",", unescape(answer)).rpartition(found[-1])
    around = before[-CHARS_AROUND:] + value + after[:CHARS_AROUND] if value else answer[-3 * CHARS_AROUND :]
    if _COMPARES.search(around):
        raise Unreadable("a sentence that compares")
    return read(found[-1]), True


def _readings(gold: str, answer: str) -> list[tuple[str, str]]:
    r"""Factors, as LaTeX, that bring both values to one unit: usually one pair.

    28\% is 28 or 0.28, as the gold answer has it; degrees are converted to radians, which have no sign.
    """
    one, other = unit_of(gold), unit_of(answer)
    if one and other:
        if {one.kind, other.kind} == {"angle", "radian"}:
            degree = _NAMED_FACTORS["angle"]
            return [(degree, "1") if one.kind == "angle" else ("1", degree)]
        same = one.clashes(other) or one.size == other.size
        return [("1", "1")] if same else [(_latex(one.size), _latex(other.size))]
    kinds = {unit.kind for unit in (one, other) if unit}
    factor = _NAMED_FACTORS.get(next(iter(kinds), ""))
    if factor is None or (kinds == {"angle"} and "pi" not in (answer if one else gold)):
        return [("1", "1")]
    return [("1", "1"), (factor, "1") if one else ("1", factor)]


def _latex(size: Fraction) -> str:
    return f"\\frac{{{size.numerator}}}{{{size.denominator}}}"


def _times(form: Form, factor: str) -> Form | None:
    """None: only a scalar, or one name's, can be scaled."""
    if factor in ("1", _ONE):
        return form
    if isinstance(form, Assigned) and len(form.pairs) == 1:
        form = form.pairs[0][1]
    return Scalar(f"{factor}\\cdot({form.text})") if isinstance(form, Scalar) else None


def compare(gold: str, answer: str) -> tuple[str, str]:
    """(verdict, how) of one pair."""
    from megatron_stepkto.answers import forms

    try:
        gold, answer = without_choice(gold, answer)
        (one, searched), (other, also_searched) = _read(gold), _read(answer)
        scaled = [(_times(one, a), _times(other, b)) for a, b in _readings(gold, answer)]
        verdicts = [forms.equal(a, b) if a is not None and b is not None else None for a, b in scaled]
    except Unreadable:
        return "undecided", "unparsed"
    if True in verdicts:
        return "right", HOW
    if searched or also_searched:  # the sentence may mean another of its values
        return "undecided", "unparsed"
    # normal forms drop the signs of a list's items
    lists = not isinstance(one, Scalar) and not isinstance(other, Scalar)
    signs_differ = any((sign in gold) != (sign in answer) for sign in ("%", "circ", "°"))
    return ("undecided", "open") if None in verdicts or (lists and signs_differ) else ("wrong", HOW)


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    cpu_seconds = float(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # output of the libraries must not mix with the replies
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
        except Exception as error:  # any failure is "undecided", with the name of the exception
            verdict, how = "undecided", f"failed: {type(error).__name__}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        milliseconds = (time.process_time() - begun) * 1000
        print(json.dumps({"verdict": verdict, "how": how, "milliseconds": milliseconds}), file=replies, flush=True)


if __name__ == "__main__":
    main()

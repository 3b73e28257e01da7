"""``stepkto check-answers``: the outcome judge's verdict on pairs of answers, one JSON object per input line."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from megatron_stepkto.answers.equivalence import EquivalenceChecker
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import parse_json
from megatron_stepkto.base.progress import say
from megatron_stepkto.base.words import counted
from megatron_stepkto.judging.outcome.answer import Outcome, judge_outcomes

BATCH = 256  # lines decided together: output lags by this many at most
READ_BYTES = 1 << 20
_WORDS = {1: "right", 0: "wrong", None: "undecided"}
_VERDICTS = {True: "right", False: "wrong", "right": "right", "wrong": "wrong"}  # 1 and 0 are True and False


def check_answers(source: str, workers: int, cpu_seconds: float, out: TextIO) -> bool:
    """Check each line ``{"gold", "pred", "expected"?}`` of a file ("-": standard input) and write its row, in order.

    Verdicts are those of ``judge_outcomes``, as in every stage. A row is ``{"line", "verdict", "how",
    "milliseconds", "answer"}``; "answer" is what ``pred`` states, null where it states none. Where the line gives
    ``expected`` (true, false, "right", "wrong" or "undecided"), the row also has "expected" and "agrees". Other keys of
    the line are copied. A line that cannot be read gives ``{"line", "error"}``. Each line is answered as it arrives,
    without waiting for the next. The summary goes to standard error.

    Returns:
        whether every line could be read.

    Raises:
        UserError: the file is missing or holds no line, or standard input is closed.
    """
    counts: Counter[str] = Counter()
    hows: Counter[str] = Counter()
    begun = time.monotonic()
    with EquivalenceChecker(workers, cpu_seconds) as checker, ExitStack() as stack:
        if source == "-":
            if sys.stdin is None:  # closed before Python began
                raise UserError("-: expected JSON lines with gold and pred on standard input, it is closed")
            handle = sys.stdin.fileno()
        else:
            if not Path(source).is_file():
                raise UserError(
                    f"{source}: expected a file of JSON lines with gold and pred, found none (- reads standard input)"
                )
            handle = stack.enter_context(Path(source).open("rb")).fileno()
        for batch in _batches(handle):
            rows = [_read(number, line) for number, line in batch]
            good = [row for row in rows if "error" not in row]
            outcomes = judge_outcomes([row.pop("pred") for row in good], [row.pop("gold") for row in good], checker)
            for row, outcome in zip(good, outcomes, strict=True):
                _fill(row, outcome)
                counts[row["verdict"]] += 1
                hows[outcome.how] += 1
                if "agrees" in row:
                    counts["expected"] += 1
                    counts["agree"] += row["agrees"]
            counts["bad"] += len(rows) - len(good)
            out.writelines(json.dumps(row) + "\n" for row in rows)
            out.flush()
    if not counts.total():
        raise UserError(f"{source}: expected JSON lines with gold and pred, found none")
    _summarise(counts, hows, time.monotonic() - begun)
    return not counts["bad"]


def _batches(handle: int) -> Iterator[list[tuple[int, bytes]]]:
    """Numbered lines in groups, as far as they have arrived, without waiting for more."""
    number, rest = 0, b""
    while True:
        chunk = os.read(handle, READ_BYTES)
        rest += chunk
        *lines, rest = rest.split(b"\n") if chunk else [rest, b""] if rest else [b""]
        for start in range(0, len(lines), BATCH):
            group = lines[start : start + BATCH]
            yield [(number + n, line) for n, line in enumerate(group, 1)]
            number += len(group)
        if not chunk:
            return


def _read(number: int, line: bytes) -> dict[str, Any]:
    """The line as a row to fill, with gold and pred as text; or its error."""
    try:
        given = parse_json(line)
        if not isinstance(given, dict):
            raise ValueError(f"expected a JSON object, got {type(given).__name__}")
        for key in ("gold", "pred"):
            if key not in given:
                raise ValueError(f'key "{key}" is missing')
            if isinstance(given[key], bool) or not isinstance(given[key], str | int | float):
                raise ValueError(f"{key}: expected a text or a number, got {given[key]!r:.60}")
            given[key] = str(given[key])
        if "expected" in given:
            expected = given["expected"]
            if expected != "undecided" and not (isinstance(expected, bool | int | str) and expected in _VERDICTS):
                raise ValueError(f"expected: must be true, false, right, wrong or undecided, got {expected!r:.60}")
            given["expected"] = _VERDICTS.get(expected, expected)
    except ValueError as error:
        reason = f"broken JSON at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        return {"line": number, "error": "an empty line" if not line.strip() else reason}
    ours = ("line", "verdict", "how", "milliseconds", "answer", "agrees", "error")
    return {"line": number, **{key: value for key, value in given.items() if key not in ours}}


def _fill(row: dict[str, Any], outcome: Outcome) -> None:
    verdict, answer = _WORDS[outcome.label], outcome.extracted
    row.update(verdict=verdict, how=outcome.how, milliseconds=round(outcome.milliseconds, 3))
    row["answer"] = f"{answer[:200]}..." if answer and len(answer) > 200 else answer
    if "expected" in row:
        # "undecided" agrees with an expected "wrong": it is not called right
        row["agrees"] = verdict == row["expected"] or (row["expected"] == "wrong" and verdict == "undecided")


def _summarise(counts: Counter[str], hows: Counter[str], seconds: float) -> None:
    checked = counts["right"] + counts["wrong"] + counts["undecided"]
    say(
        f"{counted(checked, 'pair')} in {seconds:.1f} s: {counts['right']:,} right, {counts['wrong']:,} wrong, "
        f"{counts['undecided']:,} undecided ({', '.join(f'{how} {n:,}' for how, n in hows.most_common())})"
    )
    if counts["expected"]:
        share = 100 * counts["agree"] / counts["expected"]
        say(f"agreement with expected: {counts['agree']:,} of {counts['expected']:,} ({share:.1f}%)")
    if counts["bad"]:
        say(f"{counts['bad']:,} lines could not be read: see their rows")

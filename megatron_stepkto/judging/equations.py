"""Simple equations in running text ("12 * 3 = 36", "$5 + $6 = $11", "<<12*3=36>>"), checked exactly.

A text is read as runs of numbers, operators and brackets; a run with "=" is an equation. What is not plainly
arithmetic on both sides (a variable, a root; a unit or a power, unless true) is passed over. An equation that does not
hold as read is called false only where all around it is understood (``equation_context``) and where no other reading
of it holds (``equation_readings``): a wrong "wrong" teaches a wrong step. Values are exact fractions: nothing is
evaluated, and work grows with the length of the text alone.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_stepkto.judging.equation_context import (
    NEUTRAL_COMMANDS,
    REMARK,
    Subject,
    asserted,
    continues_line_before,
    noun_after,
    of_amount,
    understood_after,
    understood_before,
    word_leaves_alone,
)
from megatron_stepkto.judging.equation_readings import StepWords, holds_otherwise
from megatron_stepkto.judging.equation_sides import NUMBER, Side, parse_side, sides_equal

MAX_CONTEXT = 100
MAX_RUN_CHARS = 300  # also bounds the depth of brackets
_LATEX = {"times": "*", "cdot": "*", "div": "/", "$": "$", "%": "%", ",": " ", "left": "", "right": ""}
_COMMAND = re.compile(r"\\(?:(times|cdot|div|left|right)(?![a-zA-Z])|([$%,]))")
_SIGNS = str.maketrans("×·⋅∙÷−–$€£", "****/--   ")
# 24,\!000  24{,}000  24\,000  24~000, and no-break and thin spaces
_THOUSANDS = re.compile(
    r"(?<=\d)(?:\\?,\\!|\{,\}(?:\\!)?|,\\,|\\[,;: ]|~|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))(?<!\d{4}.)"
)
# not the x of 0x1F, of "2x(3)" and of "$2x$"
_TIMES = re.compile(r"(?<=[\d)%])(?<!(?<![\d.])0)(\s*)[xX](?=\s*[\d.]|\s+\(|\s*\$[\d.])")
_RUN = re.compile(rf"(?:{NUMBER}|[-+*/()%= \t]|(?<=[\d)])!(?=\s*[-+*/=()]))+")
_PERCENT = re.compile(
    r"(?<=[\d)])[ \t]*(?:\\text\s*\{\s*)?\b(?:percent|per cent)\b(?!\s*(?:points?|of|less|more|off))(?:\s*\})?"
)
_MARKER = re.compile(r"\s*(?:[-*•]\s|\(?\d{1,3}[.)]\s)")  # of a list item
_BEFORE_WORDS = re.compile(r"\b(?:of|than|times|x)\s*\}?\s*$", re.IGNORECASE)
_CLOCK = re.compile(r"\d[:.]$")  # 3:00
_FRACTION = re.compile(rf"\\[dt]?frac\s*{{\s*({NUMBER})\s*}}\s*{{\s*({NUMBER})\s*}}")
_BOXED = re.compile(rf"\\boxed\s*{{\s*(\$?(?:{NUMBER}))\s*}}")
_WORDS_IN_FORMULA = re.compile(r"\\(?:text|textbf|mbox|mathrm)\s*\{[^{}]{0,80}\}\s*$")
_OPERATOR_BEFORE = re.compile(rf"\\(?!(?:{NEUTRAL_COMMANDS})\b)[a-zA-Z]+\s*$")
# What stands behind a run and multiplies it: 12 \cos C, 3 x; not words, spacing or a next relation
_MULTIPLIED = re.compile(
    r"\s*(?:\\(?!text|mbox|quad|qquad|approx|implies|Rightarrow|Longrightarrow|rightarrow|to\b|therefore|end|begin"
    r"|mathrm|left|right|neq?|leq?|geq?|equiv|quad|boxed|textbf)[a-zA-Z]|(?![aAIR]\b)[a-zA-Z](?![a-zA-Z'’]))"
)
_OPEN_BEFORE = frozenset("([{<>:;,.?!*\"'`=\n\t \u2248")
_FREE_AFTER = frozenset(")]}<>:;,.?!*\"'`\n\t ")

# A second reading, for true equations alone: numbers with a word behind them, and powers of whole numbers.
_POWER = re.compile(r"(?<![\w.,])(\d{1,4})\^(?:\{(\d{1,2})\}|(\d)(?!\d))")
_UNIT = re.compile(r"(?<=\d|\})[ \t]+(?!(?:of|than|times|and|or|plus|minus|mod|is|by|per|more|less)\b)[a-zA-Z]{2,}\b")
_TERM = rf"(?:\d{{1,4}}\^(?:\{{\d{{1,2}}\}}|\d(?!\d))|{NUMBER})(?:{_UNIT.pattern})?"
_SIDE = rf"{_TERM}(?:[ \t]*[-+*/][ \t]*{_TERM}){{0,20}}"  # bounded: work grows with the length of the text
_CHAIN = re.compile(
    rf"(?<![\w.,^)}}\]\\*/+=<>-])(?<![-+*/=^(][ \t])(?>{_SIDE}(?:[ \t]*=[ \t]*{_SIDE}){{1,8}})"
    r"(?![ \t]*[-+*/^=(%!\d\\])(?!\.\d)"
)


@dataclass(frozen=True)
class _Surroundings:
    """Of a run of equations: the text before and after it, and the words of the step that it stands in."""

    before: str
    after: str
    begins: bool  # with a whole side; else what stands before it has cut the first side off
    ends: bool
    words: StepWords

    def may_be_false(self, left: Side, right: Side, *, first: bool, last: bool) -> bool:
        """May an equation that does not hold be called false? ``first``, ``last``: it is that of its run."""
        return (
            self.words.usual
            and asserted(self.before, self.after)
            and (not (first and self.begins) or understood_before(self.before, left.text, left.lone))
            and (not (last and self.ends) or understood_after(self.after, self.before))
            and not holds_otherwise(left, right, self.words, noun_after(self.after) if last and self.ends else "")
        )


def _equations(run: str) -> Iterator[tuple[int, Side, Side]]:
    """The plain equations of a chain, each with its number in the chain."""
    sides = [parse_side(part) if part.strip() else None for part in run.split("=")]
    for number, (left, right) in enumerate(itertools.pairwise(sides)):
        if left is not None and right is not None and not (left.lone and right.lone):
            yield number, left, right


def _run_verdicts(run: str, surroundings: _Surroundings) -> list[bool | None]:
    """One verdict per equation of a run; None: it does not hold as read, and may hold otherwise."""
    verdicts: list[bool | None] = []
    last = run.count("=") - 1
    for number, left, right in _equations(run):
        equal = sides_equal(left, right)
        if equal is False and not surroundings.may_be_false(left, right, first=number == 0, last=number == last):
            equal = None
        verdicts.append(equal)
    return verdicts


def _takes(before: str, run: str) -> bool:
    """Does what stands before a run take it as a factor or an argument?"""
    if run.lstrip().startswith("("):  # f(2), but not "is (4 + 6) / 2"
        spaced = run[0].isspace() and word_leaves_alone(before, run.partition("=")[0], lone=False)
        return bool(re.search(r"['’)]$|[a-zA-Z_}]$", before)) and not spaced
    if _OPERATOR_BEFORE.search(before):
        return True
    return bool(re.search(r"\}\s*$", before)) and not _WORDS_IN_FORMULA.search(before)


def _true_with_units(text: str) -> list[bool]:
    """True for each equation that holds when words behind numbers are left out ("5 apples + 3 apples = 8 apples")
    and powers are multiplied out; one that does not hold says nothing, as the words may change its meaning.
    """
    found: list[bool] = []
    for match in _CHAIN.finditer(text):
        chain = match[0]
        if len(chain) > MAX_RUN_CHARS or _BEFORE_WORDS.search(text[max(0, match.start() - 20) : match.start()]):
            continue
        plain = _POWER.sub(lambda m: f"({int(m[1]) ** int(m[2] or m[3])}*1)", _UNIT.sub("", chain))
        if plain != chain:
            found += [True for _, left, right in _equations(plain) if sides_equal(left, right)]
    return found


def plain_text(text: str) -> str:
    """LaTeX, signs and thousands in the one notation that runs are made of."""
    text = _THOUSANDS.sub(",", text)
    text = _COMMAND.sub(lambda m: _LATEX[m[1] or m[2]], text)
    text = _BOXED.sub(r" \1 ", text)
    # a number before it would make it a mixed number, or a product
    text = _FRACTION.sub(
        lambda m: m[0] if re.search(r"[\d)}]\s*$", text[max(0, m.start() - 4) : m.start()]) else f"({m[1]}/{m[2]})",
        text,
    )
    text = text.replace("**", "  ")  # bold type; as a power it is not judged either
    text = _TIMES.sub(r"\1*", text).translate(_SIGNS)
    return _PERCENT.sub("%", text.replace(r"\(", "  ").replace(r"\)", "  "))


def check_equations(
    text: str, before: str = "", after: str = "", *, subject: Subject | None = None
) -> list[bool | None]:
    """One verdict per simple equation of a step; ``a = b = c`` is two.

    Args:
        before, after: the text around the step, in which an equation that the step breaks off may begin or go on.
        subject: the problem and the whole solution, which may be of another kind of arithmetic.

    Returns:
        True: it holds. False: it does not, and all around it is understood. None: it does not hold as read. Left to
        right, but equations with units or powers, which are told only when true, stand last.
    """
    words = StepWords(text, subject or Subject(text))
    before, text, after = plain_text(before[-MAX_CONTEXT:]), plain_text(text), plain_text(after[:MAX_CONTEXT])
    before += "\n" if before and not before.endswith("\n") else ""  # a step is a line of its own
    after = "\n" + after if after and not text.endswith("\n") else after
    marker = _MARKER.match(text)
    start = marker.end() if marker and not continues_line_before(before) else 0
    verdicts: list[bool | None] = []
    for match in _RUN.finditer(text, start):
        begin, end = _without_remark(text, match)
        run = text[begin:end]
        if "=" not in run or len(run) > MAX_RUN_CHARS:
            continue
        ahead = text[max(start, begin - MAX_CONTEXT) : begin]
        whole = _begins(ahead, run)
        if not whole:  # the left side is cut off by what stands before it
            run = run.partition("=")[2]
        behind = text[end : end + 1]
        cut = bool(behind and not run[-1:].isspace() and behind not in _FREE_AFTER)
        cut = cut and not text.startswith((r"\]", r"\\"), end)
        cut = cut or bool(_MULTIPLIED.match(text, end))
        if cut:
            run = run.rpartition("=")[0]
        surroundings = _Surroundings(
            (before if begin <= MAX_CONTEXT else "") + text[max(0, begin - MAX_CONTEXT) : begin],
            text[end : end + MAX_CONTEXT] + after,
            whole,
            not cut,
            words,
        )
        factorial = _run_verdicts(run + "!", surroundings) if behind == "!" else []  # 720 = 6 * 5!
        verdicts += factorial if factorial and all(factorial) else _run_verdicts(run, surroundings)
    return verdicts + _true_with_units(text)


def _without_remark(text: str, match: re.Match[str]) -> tuple[int, int]:
    """Start and end of a run without the brackets of a remark: "(3 + 5 = 8)", "3 + 5 = 8 (since ..."."""
    begin, end = match.span()
    first, last = match[0].partition("=")[0], match[0].rpartition("=")[2]
    if first.count("(") > first.count(")") and first.lstrip().startswith("("):
        begin += first.index("(") + 1
    bracket = end - (len(last) - len(last.rstrip())) - 1  # the last character that is no space
    if (last.count(")") > last.count("(") and text[bracket] == ")") or REMARK.match(text, bracket):
        end = bracket
    return begin, end


def _begins(before: str, run: str) -> bool:
    """Does a run begin with a whole left side, not with the rest of one ("3x" before "+ 4 = 10")?"""
    if not run[0].isspace() and ((before and before[-1] not in _OPEN_BEFORE) or _CLOCK.search(before)):
        return False
    if _takes(before, run) or (_BEFORE_WORDS.search(before) and not of_amount(before, run)):
        return False
    return not (before.strip() and run.strip()[0] in "+*/-%)")

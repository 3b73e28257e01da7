"""Simple equations in running text ("12 * 3 = 36", "$5 + $6 = $11", "<<12*3=36>>"), checked exactly.

A text is read as runs of numbers, operators and brackets; a run with "=" is an equation. What is not plainly
arithmetic on both sides (a variable, a root; a unit or a power, unless true) is passed over, not judged, and so is what
a reader could take in two ways: a wrong "wrong" teaches a wrong step. Values are exact fractions: nothing is
evaluated, and work grows with the length of the text alone.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from fractions import Fraction

MAX_RUN_CHARS = 300  # also bounds the depth of brackets
_LATEX = {
    r"\times": "*",
    r"\cdot": "*",
    r"\div": "/",
    r"\$": "$",
    r"\%": "%",
    r"\,": " ",
    r"\left": "",
    r"\right": "",
}
_SIGNS = str.maketrans("×·⋅∙÷−–$€£", "****/--   ")
_NUMBER = r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_TIMES = re.compile(r"(?<=[\d)%])(\s*)[xX](?=\s*[(\d.$])")
_RUN = re.compile(rf"(?:{_NUMBER}|[-+*/()%= \t])+")
_TOKEN = re.compile(rf"\s*({_NUMBER}|[-+*/()%])")
_MARKER = re.compile(r"\s*(?:[-*•]\s|\(?\d{1,3}[.)]\s)")  # of a list item
_BEFORE_WORDS = re.compile(r"\b(?:of|than|times|x)\s*\}?\s*$", re.IGNORECASE)
_CLOCK = re.compile(r"\d[:.]$")  # 3:00
_FRACTION = re.compile(rf"\\[dt]?frac\s*{{\s*({_NUMBER})\s*}}\s*{{\s*({_NUMBER})\s*}}")
_BOXED = re.compile(rf"\\boxed\s*{{\s*(\$?(?:{_NUMBER}))\s*}}")
_WORDS_IN_FORMULA = re.compile(r"\\(?:text|textbf|mbox|mathrm)\s*\{[^{}]{0,80}\}\s*$")
_OPERATOR_BEFORE = re.compile(
    r"\\(?!(?:quad|qquad|implies|Rightarrow|Longrightarrow|rightarrow|to|therefore|because|displaystyle|item|iff)\b)"
    r"[a-zA-Z]+\s*$"
)
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
_TERM = rf"(?:\d{{1,4}}\^(?:\{{\d{{1,2}}\}}|\d(?!\d))|{_NUMBER})(?:{_UNIT.pattern})?"
_SIDE = rf"{_TERM}(?:[ \t]*[-+*/][ \t]*{_TERM}){{0,20}}"  # bounded: work grows with the length of the text
_CHAIN = re.compile(
    rf"(?<![\w.,^)}}\]\\*/+=<>-])(?<![-+*/=^(][ \t])(?>{_SIDE}(?:[ \t]*=[ \t]*{_SIDE}){{1,8}})"
    r"(?![ \t]*[-+*/^=(%!\d\\])(?!\.\d)"
)


class _NotArithmetic(Exception):
    pass


@dataclass(frozen=True)
class Side:
    """One side of an equation. ``decimals`` counts those shown, where the side is a lone number."""

    value: Fraction | None  # None: a division by zero, equal to nothing
    lone: bool
    decimals: int
    percents: int
    sums: bool


class _Parser:
    """expression := term (("+" | "-") term)*; term := factor (("*" | "/") factor | "(" ...)*."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        position = 0
        text = text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if not match:
                raise _NotArithmetic
            self.tokens.append(match[1])
            position = match.end()
        self.position = 0

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.position += 1
        return token

    def expression(self) -> Fraction:
        value = self.term()
        while self.peek() in ("+", "-"):
            value = value + self.term() if self.take() == "+" else value - self.term()
        return value

    def term(self) -> Fraction:
        value = self.factor()
        while self.peek() in ("*", "/", "("):
            if self.peek() == "(" or self.take() == "*":  # 2(3 + 4) is a product
                value *= self.factor()
            else:
                value /= self.factor()
        return value

    def factor(self) -> Fraction:
        token = self.take()
        if token == "-":
            return -self.factor()
        if token == "(":
            value = self.expression()
            if self.take() != ")":
                raise _NotArithmetic
        elif token and token[0] in "0123456789.":
            value = Fraction(token.replace(",", ""))
        else:
            raise _NotArithmetic
        if self.peek() == "%":
            self.take()
            value /= 100
        return value


def parse_side(text: str) -> Side | None:
    """One side of an equation; None where it is not plain arithmetic."""
    try:
        parser = _Parser(text)
        try:
            value: Fraction | None = parser.expression()
        except ZeroDivisionError:
            return Side(None, False, 0, 0, False)
        if parser.position != len(parser.tokens):
            return None
    except _NotArithmetic:
        return None
    numbers = [token for token in parser.tokens if token[0] in "0123456789."]
    lone = len(numbers) == 1 and "/" not in parser.tokens
    decimals = len(numbers[0].partition(".")[2]) if lone else 0
    sums = any(token in "+-" for token in parser.tokens[1:])
    return Side(value, lone, decimals, parser.tokens.count("%"), sums)


def sides_equal(left: Side, right: Side) -> bool | None:
    """None where percents are added to plain numbers ("100 - 20% = 80"): the reading is open."""
    if left.value is None or right.value is None:
        return False
    if (left.percents and left.sums) or (right.percents and right.sums):
        return None
    for lone, other in ((right, left), (left, right)):
        if lone.lone and lone.value is not None and other.value is not None:
            # "10 / 50 * 100 = 20%" is as common as "10 / 50 = 20%"
            scales = (1, 100) if lone.percents else (1,)
            if any(abs(other.value - lone.value * scale) <= _slack(lone) for scale in scales):
                return True
            if any(_shortened(other.value, lone, scale) for scale in scales):
                return None
    return left.value == right.value


def _slack(lone: Side) -> Fraction:
    return Fraction(1, 2 * 10**lone.decimals) if lone.decimals else Fraction(0)


def _shortened(exact: Fraction, lone: Side, scale: int) -> bool:
    """Is ``lone`` what is left of ``exact`` when digits are cut off, or when it is rounded to a whole number?

    "9 / 7 = 1" may be a quotient whose remainder follows, "2 / 3 = 0.66" a way to round.
    """
    assert lone.value is not None
    unit = Fraction(scale, 10**lone.decimals * (100 if lone.percents else 1))
    given = lone.value * scale
    cut = abs(given) <= abs(exact) < abs(given) + unit and given * exact >= 0
    return cut or (lone.decimals == 0 and abs(exact - given) <= unit / 2)


def _run_verdicts(run: str) -> list[bool]:
    parts = run.split("=")
    sides = [parse_side(part) if part.strip() else None for part in parts]
    verdicts = []
    for left, right in itertools.pairwise(sides):
        if left is None or right is None or (left.lone and right.lone):
            continue
        equal = sides_equal(left, right)
        if equal is not None:
            verdicts.append(equal)
    return verdicts


def _takes(before: str, run: str) -> bool:
    """Does what stands before a run take it as a factor or an argument?"""
    if run.startswith("("):
        return bool(re.search(r"['’)]$|[a-zA-Z_}]$", before))
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
            found += [verdict for verdict in _run_verdicts(plain) if verdict]
    return found


def check_equations(text: str) -> list[bool]:
    """One truth value per simple equation of the text; ``a = b = c`` is two. Left to right, but those with units
    or powers, which are told only when true, stand last.
    """
    for name, sign in _LATEX.items():
        text = text.replace(name, sign)
    text = _BOXED.sub(r" \1 ", text)
    # a number before it would make it a mixed number, or a product
    text = _FRACTION.sub(
        lambda m: m[0] if re.search(r"[\d)}]\s*$", text[max(0, m.start() - 4) : m.start()]) else f"({m[1]}/{m[2]})",
        text,
    )
    text = text.replace("**", "  ")  # bold type; as a power it is not judged either
    text = _TIMES.sub(r"\1*", text).translate(_SIGNS)
    marker = _MARKER.match(text)
    if marker:
        text = text[marker.end() :]
    verdicts: list[bool] = []
    for match in _RUN.finditer(text):
        run = match[0]
        if "=" not in run or len(run) > MAX_RUN_CHARS:
            continue
        before, after = text[max(0, match.start() - 100) : match.start()], text[match.end() : match.end() + 1]
        stripped = run.strip()
        glued = bool(before) and not run[0].isspace() and before[-1] not in _OPEN_BEFORE
        glued = glued or bool(_CLOCK.search(before)) or _takes(before, stripped)
        if glued or _BEFORE_WORDS.search(before) or (before.strip() and stripped[0] in "+*/-%)"):
            first = stripped.find("=")  # the left side is cut off by what stands before it
            run = run[run.find("=") + 1 :] if first >= 0 else ""
        if (after and not run[-1:].isspace() and after not in _FREE_AFTER) or _MULTIPLIED.match(text, match.end()):
            run = run[: run.rfind("=")] if "=" in run else ""
        verdicts += _run_verdicts(run)
    return verdicts + _true_with_units(text)

"""The sides of an equation: read as plain arithmetic, valued as exact fractions, compared."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

NUMBER = r"[1-9]\d{0,2}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
MAX_FACTORIAL = 20
FLOAT_DECIMALS, FLOAT_ERROR = 12, Fraction(1, 10**12)
_TOKEN = re.compile(rf"\s*({NUMBER}|[-+*/()%!])")


class _NotArithmetic(Exception):
    pass


@dataclass(frozen=True)
class Side:
    """One side of an equation. ``decimals`` counts those shown, where the side is a lone number."""

    text: str
    tokens: tuple[str, ...]
    value: Fraction | None  # None: a division by zero, equal to nothing
    lone: bool
    decimals: int
    percents: int
    sums: bool

    @property
    def numbers(self) -> list[str]:
        return [token for token in self.tokens if token[0] in "0123456789."]


class _Parser:
    """expression := term (("+" | "-") term)*; term := factor (("*" | "/") factor | "(" ...)*."""

    def __init__(self, tokens: Sequence[str], percent: Fraction, divides_by_rest: bool) -> None:
        self.tokens, self.percent, self.divides_by_rest = tokens, percent, divides_by_rest
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
                value /= self.term() if self.divides_by_rest else self.factor()
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
        if self.peek() == "!":
            self.take()
            value = _factorial(value)
        if self.peek() == "%":
            self.take()
            value *= self.percent
        return value


def _factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL:
        raise _NotArithmetic
    return Fraction(math.factorial(int(value)))


def value_of(
    tokens: Sequence[str], *, percent: Fraction = Fraction(1, 100), divides_by_rest: bool = False
) -> Fraction | None:
    """The value of an expression.

    Args:
        percent: what "%" multiplies by.
        divides_by_rest: "a / b * c" is a / (b * c) and "a / b / c" is a / (b / c), as some write it.

    Returns:
        None where it is not plain arithmetic.

    Raises:
        ZeroDivisionError: it divides by zero.
    """
    parser = _Parser(tokens, percent, divides_by_rest)
    try:
        value = parser.expression()
    except _NotArithmetic:
        return None
    return value if parser.position == len(tokens) else None


def tokens_of(text: str) -> tuple[str, ...] | None:
    """Numbers, operators and brackets; None where the text holds something else."""
    tokens, position, text = [], 0, text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match:
            return None
        tokens.append(match[1])
        position = match.end()
    return tuple(tokens)


def parse_side(text: str) -> Side | None:
    """One side of an equation; None where it is not plain arithmetic."""
    tokens = tokens_of(text)
    if not tokens:
        return None
    try:
        value = value_of(tokens)
    except ZeroDivisionError:
        return Side(text, tokens, None, False, 0, 0, False)
    if value is None:
        return None
    numbers = [token for token in tokens if token[0] in "0123456789."]
    lone = len(numbers) == 1 and "/" not in tokens and "!" not in tokens
    decimals = len(numbers[0].partition(".")[2]) if lone else 0
    sums = any(token in "+-" for token in tokens[1:])
    return Side(text, tokens, value, lone, decimals, tokens.count("%"), sums)


def sides_equal(left: Side, right: Side) -> bool | None:
    """None where percents are added to plain numbers ("100 - 20% = 80"), or digits are cut off: the reading is open."""
    if left.value is None or right.value is None:
        return False
    if (left.percents and left.sums) or (right.percents and right.sums):
        return True if left.value == right.value else None
    for lone, other in ((right, left), (left, right)):
        if lone.lone and lone.value is not None and other.value is not None:
            # "10 / 50 * 100 = 20%" is as common as "10 / 50 = 20%"
            scales = (1, 100) if lone.percents else (1,)
            if any(abs(other.value - lone.value * scale) <= slack(lone) for scale in scales):
                return True
            if any(_shortened(other, lone, scale) for scale in scales):
                return None
    return left.value == right.value


def slack(lone: Side) -> Fraction:
    """How far a value may lie from a lone number that is its rounding, or a computer's sum ("14.999999999999998")."""
    if lone.decimals >= FLOAT_DECIMALS:
        return FLOAT_ERROR * max(abs(lone.value or Fraction(0)), Fraction(1))
    return Fraction(1, 2 * 10**lone.decimals) if lone.decimals else Fraction(0)


def _shortened(other: Side, lone: Side, scale: int) -> bool:
    """Is ``lone`` what is left of the other side when digits are cut off, or when it is rounded to a whole number?

    "9 / 7 = 1" may be a quotient whose remainder follows, "2 / 3 = 0.66" a way to round, "17 / 5 = 4" tells buses.
    """
    assert lone.value is not None and other.value is not None
    exact = other.value
    unit = Fraction(scale, 10**lone.decimals * (100 if lone.percents else 1))
    given = lone.value * scale
    cut = abs(given) <= abs(exact) < abs(given) + unit and given * exact >= 0
    near = abs(exact - given) < unit if "/" in other.tokens else abs(exact - given) <= unit / 2
    return cut or (lone.decimals == 0 and near)

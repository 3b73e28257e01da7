"""Equivalence that needs no computer algebra: normal forms, exact numbers, lists of them."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_stepkto.judging.answers import normalise

MAX_DIGITS = 1000  # longer numbers cost more than they tell
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)", re.ASCII)
_RATIO = re.compile(r"([-+]?)(?:(\d+)\s*)?\\frac\{(-?\d+)\}\{(-?\d+)\}|([-+]?)(?:(\d+) )?(\d+)/(\d+)", re.ASCII)
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d\d?", re.ASCII)
_LIST = re.compile(r"([(\[])(.*)([)\]])", re.DOTALL)
_WORDS = re.compile(r"[A-Za-z]{3,}(?: [A-Za-z]+)*")
CLOSE = Fraction(1, 1000)  # relative: a decimal this near to a fraction may be its rounding


def to_number(form: str) -> Fraction | None:
    """Exact value of a normal form that is an integer, a decimal, a fraction or a mixed number; else None."""
    if len(form) > MAX_DIGITS:
        return None
    if _NUMBER.fullmatch(form):
        return Fraction(form)
    match = _RATIO.fullmatch(form)
    if not match:
        return None
    sign, whole, top, bottom = match.groups()[:4] if match[3] else match.groups()[4:]
    if int(bottom) == 0:
        return None
    value = int(whole or 0) + Fraction(int(top), int(bottom))
    return -value if sign == "-" else value


def _compare_numbers(gold: Fraction, answer: Fraction, rounding: bool) -> bool | None:
    if gold == answer:
        return True
    if rounding and abs(gold - answer) <= CLOSE * abs(gold):
        return None
    return False


def _is_rounding(gold: str, answer: str) -> bool:
    """One is a decimal and the other a fraction: 0.333333 for 1/3 is for others to judge."""
    return ("." in gold) != ("." in answer) and ("/" in gold + answer or "\\frac" in gold + answer)


def _compare_lists(gold: str, answer: str) -> bool | None:
    one, other = _LIST.fullmatch(gold), _LIST.fullmatch(answer)
    if not one or not other or one[1] + one[3] != other[1] + other[3]:
        return None
    left, right = one[2].split(","), other[2].split(",")
    if len(left) != len(right):
        return None
    verdicts = [compare(a, b) for a, b in zip(left, right, strict=True)]
    if all(verdicts):
        return True
    numbers = all(to_number(normalise(item)) is not None for item in (*left, *right))
    return False if numbers and False in verdicts else None


def compare(gold: str, answer: str) -> bool | None:
    """True or False where it is certain, None where somebody must compute."""
    one, other = normalise(gold), normalise(answer)
    if not one or not other:
        return None
    if one == other:
        return True
    a, b = to_number(one), to_number(other)
    if a is not None and b is not None:
        if ("%" in gold) != ("%" in answer) and (a == b / 100 or b == a / 100):
            return True
        return _compare_numbers(a, b, _is_rounding(one, other))
    if len(one) == len(other) == 1 and one in "ABCDEFGHIJ" and other in "ABCDEFGHIJ":
        return False
    if _WORDS.fullmatch(one) and _WORDS.fullmatch(other):
        if one.casefold() == other.casefold():
            return True
        # computer algebra reads words as products of letters, so that anagrams would be equal
        return None if sorted(one) == sorted(other) else False
    for form, number in ((one, b), (other, a)):
        # "1000,99" is a number in half of the world, and a list elsewhere: equal counts, different does not
        if number is not None and _DECIMAL_COMMA.fullmatch(form):
            return True if Fraction(form.replace(",", ".")) == number else None
    return _compare_lists(one, other)

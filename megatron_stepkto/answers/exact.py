"""Equivalence that needs no computer algebra: normal forms, exact numbers, units, lists of them."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_stepkto.answers.choices import bare_choice, named_choice
from megatron_stepkto.answers.text import normalise
from megatron_stepkto.answers.units import unit_of

MAX_DIGITS = 1000  # longer numbers cost more than they tell
MAX_ANSWER_CHARS = 10_000  # what is longer is compared as text
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)", re.ASCII)
_RATIO = re.compile(r"([-+]?)(?:(\d+)\s*)?\\frac\{(-?\d+)\}\{(-?\d+)\}|([-+]?)(?:(\d+) )?(\d+)/(\d+)", re.ASCII)
_SCIENTIFIC = re.compile(
    r"(?P<value>[-+]?(?:\d+(?:\.\d*)?|\.\d+))(?:[eE]|(?:\\times|\\cdot|\*|×|x)10\^)\{?(?P<power>[-+]?\d{1,3})\}?",
    re.ASCII,
)
_SCALED = re.compile(
    r"(?P<value>[-+]?\d+(?:\.\d+)?) ?(?P<word>hundred|thousand|million|billion|trillion|dozen)", re.ASCII
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d\d?", re.ASCII)
_LIST = re.compile(r"([(\[])(.*)([)\]])", re.DOTALL)
_WORDS = re.compile(r"[A-Za-z]{3,}(?: [A-Za-z]+)*")
_IN_BASE = re.compile(r"(?P<digits>[0-9A-Za-z]{1,200})_\{?(?P<base>\d{1,2}|[a-z]{3,7})\}?", re.ASCII)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
          "twelve": 12, "sixteen": 16}  # fmt: skip
_CLOCK = re.compile(r"\d{1,2}:\d\d", re.ASCII)
_LIST_WORDS = re.compile(r"\s*(?:;|,?\band\b)\s*")
_SET = re.compile(r"\\\{.*\\\}", re.DOTALL)
_TUPLE = re.compile(r"[(\[].*[)\]]", re.DOTALL)
CLOSE = Fraction(1, 1000)  # relative: a decimal this near to a fraction may be its rounding


class Doubt(str):
    """Why two answers whose values agree may still differ: the pair is undecided, whoever else is asked."""


Exact = bool | Doubt | None


def to_number(form: str) -> Fraction | None:
    """Exact value of a normal form that is an integer, a decimal, a fraction, a mixed number, 1.5e3 or 2 million."""
    if len(form) > MAX_DIGITS:
        return None
    if _NUMBER.fullmatch(form):
        return Fraction(form)
    if match := _SCIENTIFIC.fullmatch(form):
        return Fraction(match["value"]) * Fraction(10) ** int(match["power"])
    if match := _SCALED.fullmatch(form):
        return Fraction(match["value"]) * _SCALES[match["word"]]
    match = _RATIO.fullmatch(form)
    if not match:
        return None
    sign, whole, top, bottom = match.groups()[:4] if match[3] else match.groups()[4:]
    if int(bottom) == 0:
        return None
    value = int(whole or 0) + Fraction(int(top), int(bottom))
    return -value if sign == "-" else value


def _is_rounding(gold: str, answer: str) -> bool:
    """One is a decimal and the other a fraction: 0.333333 for 1/3 is for others to judge."""
    return ("." in gold) != ("." in answer) and ("/" in gold + answer or "\\frac" in gold + answer)


def _compare_numbers(a: Fraction, b: Fraction, gold: str, answer: str) -> Exact:
    """Values of the normal forms of ``gold`` and ``answer``, which drop units: those come back here."""
    one, other = unit_of(gold), unit_of(answer)
    if one and other and not one.clashes(other):
        a, b = a * one.size, b * other.size
    if not one and other and other.kind == "share":
        # "0.5%" for 0.5 may be a fraction of a percent; above 1 the question asked for percent
        return b / 100 == a or (b == a and (abs(a) >= 1 or Doubt("percent"))) or False
    if one and one.kind == "share" and not other and a / 100 == b:
        return True
    if a == b:
        return Doubt("units") if one and other and one.clashes(other) else True
    rounding = _is_rounding(normalise(gold), normalise(answer)) and abs(a - b) <= CLOSE * abs(a)
    return None if rounding else False


def _in_base(form: str) -> tuple[str, int] | None:
    """(digits, base) of '1011_2' or 'A3_{16}'; None where the digits do not fit the base, as in x_1."""
    match = _IN_BASE.fullmatch(form)
    if not match:
        return None
    base = _BASES.get(match["base"], int(match["base"]) if match["base"].isdigit() else 0)
    digits = match["digits"].lower()
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits):
        return None
    return digits.lstrip("0") or "0", base


def _compare_in_base(gold: str, answer: str) -> Exact:
    """An answer without a base is in the gold's: the problem names it. A gold without one is decimal, or not."""
    a, b = _in_base(gold), _in_base(answer)
    if a is None and b is None:
        return None
    if a is None or b is None:
        digits, base = a or b  # type: ignore[misc]
        plain = (answer if a else gold).lower()
        if not re.fullmatch(r"\d+", plain, re.ASCII):
            return None
        if plain.lstrip("0") == digits:
            return True if a else Doubt("base")
        return Doubt("base") if len(plain) < 200 and int(digits, base) == int(plain) else False
    if a[1] == b[1]:
        return a[0] == b[0]
    return Doubt("base") if int(*a) == int(*b) else False


def _compare_lists(gold: str, answer: str) -> Exact:
    one, other = _LIST.fullmatch(gold), _LIST.fullmatch(answer)
    if not one or not other or one[1] + one[3] != other[1] + other[3]:
        return None
    left, right = one[2].split(","), other[2].split(",")
    if len(left) != len(right):
        return None
    verdicts = [compare(a, b) for a, b in zip(left, right, strict=True)]
    if all(verdict is True for verdict in verdicts):
        return True
    numbers = all(to_number(normalise(item)) is not None for item in (*left, *right))
    return False if numbers and False in verdicts else None


def _compare_choices(gold: str, answer: str) -> bool | None:
    """One of them is a letter of a multiple-choice question; the other is one or a text that names one."""
    one = bare_choice(gold) or named_choice(gold)
    other = bare_choice(answer) or named_choice(answer)
    return one == other if one and other else None


def _compare_long(gold: str, answer: str) -> Exact:
    """Texts of any length, in linear time: equal up to white space, commas and zeros, or two plain integers."""
    one, other = (re.sub(r"[\s,$]|\{,\}", "", text).strip(".") for text in (gold, answer))
    integers = all(text.isascii() and text.isdigit() for text in (one, other))
    if integers:
        one, other = one.lstrip("0"), other.lstrip("0")
    return True if one == other else False if integers else None


def doubt(gold: str, answer: str) -> Doubt | None:
    """Why a checker that ignores notation must not call these two equal.

    Computer algebra drops units and bases, reads 1:30 as a ratio, and takes a set for an interval.
    """
    if max(len(gold), len(answer)) > MAX_ANSWER_CHARS:
        return None
    one, other = unit_of(gold), unit_of(answer)
    if one and other and (one.clashes(other) or one.size != other.size):
        return Doubt("units")
    a, b = normalise(gold), normalise(answer)
    if _in_base(a) or _in_base(b):
        return Doubt("base")
    if _CLOCK.fullmatch(a) and _CLOCK.fullmatch(b) and a != b:
        return Doubt("time or ratio")
    if (_SET.fullmatch(a) and _TUPLE.fullmatch(b)) or (_TUPLE.fullmatch(a) and _SET.fullmatch(b)):
        return Doubt("set or tuple")
    return None


def compare(gold: str, answer: str) -> Exact:
    """True or False where it is certain, a Doubt where nobody can tell, None where somebody must compute."""
    if max(len(gold), len(answer)) > MAX_ANSWER_CHARS:
        return _compare_long(gold, answer)
    one, other = normalise(gold), normalise(answer)
    if not one or not other:
        return None
    a, b = to_number(one), to_number(other)
    if a is not None and b is not None:
        return _compare_numbers(a, b, gold, answer)
    if one == other:
        return doubt(gold, answer) if _in_base(one) is None and doubt(gold, answer) else True
    if _LIST_WORDS.sub(",", one).replace(" ", "") == _LIST_WORDS.sub(",", other).replace(" ", ""):
        return True
    if (verdict := _compare_in_base(one, other)) is not None:
        return verdict
    if (bare_choice(one) or bare_choice(other)) and (verdict := _compare_choices(one, other)) is not None:
        return verdict
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

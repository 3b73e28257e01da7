"""Equivalence that needs no computer algebra: normal forms, exact numbers, units, lists of them."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_stepkto.answers.choices import bare_choice, choice_and_value, named_choice
from megatron_stepkto.answers.text import SCALES, normalise, unwrap
from megatron_stepkto.answers.units import sum_of_quantities, time_of_day, unit_of

MAX_DIGITS = 1000  # longer numbers are not worth their cost
MAX_ANSWER_CHARS = 10_000  # longer answers are compared as text
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)", re.ASCII)
_PLAIN = re.compile(r"-?\d{1,100}(?:\.\d{1,100})?", re.ASCII)
_RATIO = re.compile(r"([-+]?)(?:(\d+)\s*)?\\frac\{(-?\d+)\}\{(-?\d+)\}|([-+]?)(?:(\d+) )?(\d+)/(\d+)", re.ASCII)
_SCIENTIFIC = re.compile(
    r"(?P<value>[-+]?(?:\d+(?:\.\d*)?|\.\d+))(?:[eE]|(?:\\times|\\cdot|\*|×|x)10\^)\{?(?P<power>[-+]?\d{1,3})\}?",
    re.ASCII,
)
_SCALED = re.compile(rf"(?P<value>[-+]?\d+(?:\.\d+)?) ?(?P<word>{'|'.join(SCALES)})", re.ASCII)
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d\d?", re.ASCII)
_LONG_DECIMAL_COMMA = re.compile(r"[-+]?\d{4,},\d\d", re.ASCII)
_VALUE_AND_LETTER = re.compile(r"(?P<value>[-+]?[\d.,/]*\d)(?:\s|\\[ ,;:!]|~)+(?P<letter>[mgshlL])")
_COMMA_GROUPS = re.compile(r"\d{1,3}(?:,\d{3})+", re.ASCII)
_LIST = re.compile(r"([(\[])(.*)([)\]])", re.DOTALL)
_WORDS = re.compile(r"(?:[A-Za-z]{3,}|[Nn]o)(?: [A-Za-z]+)*")
_WORD = re.compile(r"[A-Za-z]{3,}")
_UNFINISHED = re.compile(r"\d *[+*×] *[A-Za-z]{4,}")  # 10 + John's age: not a value
_FORMULA_WITH_NUMBER = re.compile(r"(?=.*\d)(?:[^A-Za-z\\]|\\[a-z]+|(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z]))+", re.ASCII)
# words that may name a number
_COUNTED = (
    "thirty forty fifty sixty seventy eighty ninety hundred thousand million billion half third quarter once twice "
    "thrice dozen pair couple none nil nothing never infinity infinite undefined zero dne"
)
_COUNTS = frozenset(_COUNTED.split())
_IN_BASE = re.compile(r"(?P<digits>[0-9A-Za-z]{1,200})_\{?(?P<base>\d{1,2}|[a-z]{3,7})\}?", re.ASCII)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
          "twelve": 12, "sixteen": 16}  # fmt: skip
_CLOCK = re.compile(r"\d{1,2}:\d\d", re.ASCII)
_LIST_WORDS = re.compile(r"\s*(?:;|,?\band\b)\s*")
_LOOSE_SPACE = re.compile(r"(?<!\d) +| +(?!\d)")  # not in "1 2", which is not 12
_SET = re.compile(r"\\\{.*\\\}", re.DOTALL)
_TUPLE = re.compile(r"[(\[].*[)\]]", re.DOTALL)
CLOSE = Fraction(1, 1000)  # relative: a decimal this near to a fraction may be its rounding


class Doubt(str):
    """Why two answers whose values agree may still differ: the pair is undecided, whatever computer algebra finds."""


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
        return Fraction(match["value"]) * SCALES[match["word"]]
    match = _RATIO.fullmatch(form)
    if not match:
        return None
    sign, whole, top, bottom = match.groups()[:4] if match[3] else match.groups()[4:]
    if int(bottom) == 0:
        return None
    value = int(whole or 0) + Fraction(int(top), int(bottom))
    return -value if sign == "-" else value


def _compare_numbers(a: Fraction, b: Fraction, gold: str, answer: str) -> Exact:
    """Compare the values of two normal forms, which drop units: the units are compared here."""
    one, other = unit_of(gold), unit_of(answer)
    if one and other and one.may_convert(other):
        return Doubt("units")
    if one and other and not one.clashes(other):
        a, b = a * one.size, b * other.size
    for unit, share, missing, plain in ((other, b, one, a), (one, a, other, b)):
        if unit and unit.kind == "share" and not missing:
            # "0.5%" for 0.5 may be a fraction of a percent; above 1 the question asked for percent
            return share / 100 == plain or (share == plain and (abs(share) >= 1 or Doubt("percent"))) or False
    if a == b:
        return Doubt("units") if one and other and one.clashes(other) else True
    gold, answer = normalise(gold), normalise(answer)
    decimal_and_fraction = ("." in gold) != ("." in answer) and ("/" in gold + answer or "\\frac" in gold + answer)
    # whether 0.333333 is 1/3 is left to computer algebra
    return None if decimal_and_fraction and abs(a - b) <= CLOSE * abs(a) else False


def _in_base(form: str) -> tuple[str, int] | None:
    """(digits, base) of '1011_2' or 'A3_{16}'; None where the digits do not fit the base, as in x_1."""
    if not (match := _IN_BASE.fullmatch(form)):
        return None
    base = _BASES.get(match["base"], int(match["base"]) if match["base"].isdigit() else 0)
    digits = match["digits"].lower()
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits):
        return None
    return digits.lstrip("0") or "0", base


def _compare_in_base(gold: str, answer: str) -> Exact:
    """An answer without a base is in the gold's base, which the problem names. A gold without one is ambiguous."""
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


def _bare(answer: str) -> str:
    """Without the delimiters of a formula, and a full stop after them."""
    return unwrap(answer.strip().rstrip("."))


def _grouped(answer: str) -> list[str] | None:
    """The groups of '107,113', which is a number or a list. '1,012' and '$1,012' are certainly numbers."""
    text = _bare(answer)
    if not _COMMA_GROUPS.fullmatch(text):
        return None
    groups = text.split(",")
    return None if any(group.startswith("0") for group in groups) else groups


def _compare_grouped(gold: str, answer: str, one: str, other: str) -> Exact:
    """A number with commas, or a list without spaces? Decided by the other side, else a doubt.

    A list has numbers of similar size: "107,113" may be a list, "1,450" is a number. An answer to a gold number is a
    number.
    """
    gold_groups, answer_groups = _grouped(gold), _grouped(answer)
    for groups, form in ((gold_groups, other), (answer_groups, one)):
        if groups and sorted(form.split(",")) == sorted(groups):  # a list with spaces: normal forms keep its commas
            return True
    if gold_groups and answer_groups and gold != answer and sorted(gold_groups) == sorted(answer_groups):
        return Doubt("list or number")
    if gold_groups and not answer_groups and all(len(group) == 3 for group in gold_groups):
        return Doubt("list or number") if one == other else None
    return None


def _compare_quantities(gold: str, answer: str) -> Exact:
    """Times of the day, and sums of units: 4:30 PM and 16:30, 1 hour 30 minutes and 90 minutes."""
    time, other_time = time_of_day(gold), time_of_day(answer)
    if time and other_time:
        (one, certain), (other, also_certain) = time, other_time
        if certain and also_certain:
            return one == other
        if one == other or ((certain or also_certain) and (one - other) % 720 == 0):
            return True
        return False if certain or also_certain else Doubt("time or ratio")
    sums = sum_of_quantities(gold), sum_of_quantities(answer)
    if not sums[0] and not sums[1]:
        return None
    values = [found or _quantity(text) for found, text in zip(sums, (gold, answer), strict=True)]
    if values[0] is None or values[1] is None:
        return Doubt("units")
    return values[0][0] == values[1][0] if values[0][1] == values[1][1] else Doubt("units")


def _compare_letters_of_units(gold: str, answer: str) -> Exact:
    """ "10 m" is a length or a product: a length if the other side is one, a doubt if it is only a number."""
    for text, other in ((gold, answer), (answer, gold)):
        match = _VALUE_AND_LETTER.fullmatch(_bare(text))
        if match and not _VALUE_AND_LETTER.fullmatch(_bare(other)):
            one, value = unit_of(rf"{match['value']}\text{{ {match['letter']}}}"), to_number(normalise(match["value"]))
            unit, other_value = unit_of(other), to_number(normalise(other))
            if one and unit and not one.clashes(unit) and value is not None and other_value is not None:
                return value * one.size == other_value * unit.size
            return Doubt("units") if value is not None and value == other_value else None
    return None


def _quantity(answer: str) -> tuple[Fraction, str] | None:
    value, unit = to_number(normalise(answer)), unit_of(answer)
    return (value * unit.size, unit.kind) if value is not None and unit else None


def _compare_choices(gold: str, answer: str) -> Exact:
    """One is a letter of a multiple-choice question; the other is a letter, or a text that names one. A letter whose
    value is unknown and a number may be the same choice."""
    one = bare_choice(gold) or named_choice(gold)
    other = bare_choice(answer) or named_choice(answer)
    if one and other:
        return one == other
    return None if to_number(gold) is None and to_number(answer) is None else Doubt("choice or value")


def _compare_values_of_choices(gold: str, answer: str) -> Exact:
    """\\textbf{(D)}\\ 12 has a letter and a value: each is compared with what the other side has."""
    one, other = choice_and_value(gold), choice_and_value(answer)
    if one and other:
        letters, values = one[0] == other[0], compare(one[1], other[1])
        return letters if letters is values else None
    letter, value = one or other or ("", "")
    plain = answer if one else gold
    if named := bare_choice(normalise(plain)):
        return named == letter
    return compare(value, plain) if one else compare(plain, value)


def _compare_long(gold: str, answer: str) -> Exact:
    """Texts of any length, in linear time: equal up to white space, commas and zeros, or two plain integers."""
    one, other = (re.sub(r"[\s,$]|\{,\}", "", text).strip(".") for text in (gold, answer))
    integers = all(text.isascii() and text.isdigit() for text in (one, other))
    if integers:
        one, other = one.lstrip("0"), other.lstrip("0")
    return True if one == other else False if integers else None


def doubt(gold: str, answer: str) -> Doubt | None:
    """Why a checker that ignores notation must not call these two equal: computer algebra sees no unit and no base."""
    if max(len(gold), len(answer)) > MAX_ANSWER_CHARS:
        return None
    one, other = unit_of(gold), unit_of(answer)
    if one and other and one.clashes(other) and {one.kind, other.kind} != {"angle", "radian"}:
        return Doubt("units")
    return Doubt("base") if _in_base(normalise(gold)) or _in_base(normalise(answer)) else None


def why_open(gold: str, answer: str) -> Doubt | None:
    """The notation for which computer algebra leaves a pair open, where it is a usual one."""
    a, b = normalise(gold), normalise(answer)
    if _CLOCK.fullmatch(a) and _CLOCK.fullmatch(b):
        return Doubt("time or ratio")
    if (_SET.fullmatch(a) and _TUPLE.fullmatch(b)) or (_TUPLE.fullmatch(a) and _SET.fullmatch(b)):
        return Doubt("set or tuple")
    return None


def compare(gold: str, answer: str) -> Exact:
    """True or False where certain, a Doubt where the notation is ambiguous, None where it takes computer algebra."""
    if max(len(gold), len(answer)) > MAX_ANSWER_CHARS:
        return _compare_long(gold, answer)
    if _PLAIN.fullmatch(gold) and _PLAIN.fullmatch(answer):  # most pairs
        return Fraction(gold) == Fraction(answer)
    if choice_and_value(gold) or choice_and_value(answer):
        return _compare_values_of_choices(gold, answer)
    for comparison in (_compare_quantities, _compare_letters_of_units):
        if (verdict := comparison(gold, answer)) is not None:
            return verdict
    one, other = normalise(gold), normalise(answer)
    if not one or not other:
        return None
    if (verdict := _compare_grouped(gold, answer, one, other)) is not None:
        return verdict
    a, b = to_number(one), to_number(other)
    if a is not None and b is not None:
        return _compare_numbers(a, b, gold, answer)
    if (verdict := _compare_forms(one, other, gold, answer)) is not None:
        return verdict
    for form, number in ((one, b), (other, a)):
        # "1000,99" is a decimal in many countries, "1,99" may be a list: equal is a verdict, different is not
        if number is not None and _DECIMAL_COMMA.fullmatch(form):
            equal = Fraction(form.replace(",", ".")) == number
            return None if not equal else True if _LONG_DECIMAL_COMMA.fullmatch(form) else Doubt("list or number")
    return _compare_lists(one, other)


def _compare_forms(one: str, other: str, gold: str, answer: str) -> Exact:
    """Two normal forms, at least one not a number: as texts, numerals of a base, choices, words."""
    if one == other:
        units = unit_of(gold), unit_of(answer)
        if units[0] and units[1] and not units[0].clashes(units[1]) and units[0].size != units[1].size:
            return None
        return (doubt(gold, answer) if _in_base(one) is None else None) or True
    lists = [_LOOSE_SPACE.sub("", _LIST_WORDS.sub(",", form)) for form in (one, other)]
    if lists[0] == lists[1]:
        return True
    if (verdict := _compare_in_base(one, other)) is not None:
        return verdict
    if bare_choice(one) or bare_choice(other):
        return _compare_choices(one, other)
    if _WORDS.fullmatch(one) and _WORDS.fullmatch(other):
        return _compare_words(one.casefold(), other.casefold())
    if _UNFINISHED.search(other) and to_number(one) is not None:
        return False
    for word, form in ((one, other), (other, one)):
        if _WORD.fullmatch(word) and word.casefold() not in _COUNTS and _FORMULA_WITH_NUMBER.fullmatch(form):
            return False
    return None


def _compare_words(one: str, other: str) -> Exact:
    if one == other:
        return True
    # computer algebra reads words as products of letters, so that anagrams would be equal
    if sorted(one) == sorted(other):
        return None
    if " " not in one + other:
        short, long = sorted((one, other), key=len)
        return Doubt("words") if len(long) - len(short) > 1 and long.startswith(short) else False  # Tues, Tuesday
    return Doubt("words")  # "no solution" and "none": takes knowledge of the language

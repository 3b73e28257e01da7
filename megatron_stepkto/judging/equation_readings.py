"""Other readings under which an equation that is false as written holds.

"24.000 / 6 = 4000" holds where the full stop groups thousands, "45 + 45 = 1.5 hours" where the 45 are minutes. Each
reading here is one that people use; where one holds, the equation is neither true nor false.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cached_property

from megatron_stepkto.judging.equation_context import NOT_A_NOUN, Subject, unrefuted
from megatron_stepkto.judging.equation_sides import Side, slack, tokens_of, value_of

_HYPHENS = re.compile(r"\s*\d+(?:-\d+)+\s*")
_PAIR = re.compile(r"\(\s*\d{1,3}(?:,\d{3})+\s*\)")
_GROUPED_BY_STOPS = re.compile(r"\d{1,3}(?:\.\d{3})+")
_LEADING_ZERO = re.compile(r"0\d")
_CLOCK_TIME = re.compile(r"(\d{1,2})\.([0-5]\d)")
_CLOCK_NUMBER = re.compile(r"(1?\d|2[0-4])([0-5]\d)")
_HYPHENED = re.compile(r"(?<![\d.])(\d+)-(\d+/\d+)")  # 1-1/2
_IMPLICIT_DIVISOR = re.compile(r"/\s*[\d.,]+\s*\(")  # 12 / 2(3)
MAX_ROUNDED = 4

# Words that name a kind of quantity: factors between its usual units. ``judging.units`` knows the sizes of named units;
# here only one of the two is named, or none: "45 + 45 = 1.5 hours".
_TENS = (10, 100, 1000, 10**6)
_LENGTHS = (
    *(3, 9, 12, 27, 36, 144, 640, 1296, 1728, 1760, 5280, 10000, 43560, 63360),  # squares and cubes too
    *("254/100", "3048/1000", "8/5", "1609/1000"),
    *_TENS,
)
_FACTORS: tuple[tuple[re.Pattern[str], tuple[int | str, ...]], ...] = tuple(
    (re.compile(rf"(?<![A-Za-z])(?:{words})(?![A-Za-z])|{signs}", re.IGNORECASE), factors)
    for words, signs, factors in (
        (
            r"(?:milli)?seconds?|secs?|minutes?|mins?|hours?|hrs?|days?|weeks?|months?|years?|decades?|century|centuries"
            r"|mph|kmh|daily|weekly|monthly|yearly|annual(?:ly)?",
            r"/h\b",
            (7, 10, 12, 24, 28, 30, 31, 52, 60, 100, 168, 360, 365, 366, 1000, 1440, 3600, 8760, 10080, 86400),
        ),
        (
            r"(?:milli|centi|deci|kilo)?met(?:er|re)s?|[mckd]?m|inch(?:es)?|ft|foot|feet"
            r"|yards?|yds?|miles?|mi|acres?|hectares?|blocks?|furlongs?",
            r"\bin\.",
            _LENGTHS,
        ),
        (
            r"(?:milli|kilo)?grams?|[mk]?g|kilos?|pounds?|lbs?|ounces?|oz|tons?|tonnes?|stones?",
            r"\blb\.",
            (14, 16, 2000, 2240, "22/10", "2205/1000", "4536/10000", "2835/100", *_TENS),
        ),
        (
            r"(?:milli|centi)?(?:lit(?:er|re)s?)|[mcd]?l|gallons?|gal|quarts?|qts?|pints?|pts?|cups?|(?:table|tea)spoons?|tbsp"
            r"|tsp|fl",
            r"\bgal\.",
            (4, 8, 16, 32, 48, 64, 128, 256, 768, "3785/1000", "379/100", *_TENS),
        ),
        (r"quarts?|pints?|cups?|(?:table|tea)spoons?|tbsp|tsp", r"(?!)", (2, 3, 6)),
        (r"km/?h|kph|m/s", r"(?!)", ("18/5",)),
        (r"dollars?|cents?|pence|euros?|bucks?|usd|rupees?|paise?", r"[¢$€£]", (100,)),
        (r"penn(?:y|ies)|nickels?|dimes?|quarters?|coins?|half[- ]dollars?", r"(?!)", (2, 4, 5, 10, 20, 25, 50, 100)),
        (r"dozens?|gross|scores?|pairs?|couples?|reams?", r"(?!)", (2, 12, 20, 144, 500)),
        (r"hundreds?|thousands?|millions?|billions?|k|mil|thousandths?", r"\d[kKM]\b", (100, 1000, 10**6, 10**9)),
        (r"percents?|percentages?|per[ \t]+cent|pct|rate|ratio|fraction|proportion|probability|chance", r"%", (100,)),
        (r"degrees?|revolutions?|rotations?|turns?|radians?|arcminutes?|circ", r"°", (60, 90, 180, 360, 3600)),
        (r"averages?|mean|midpoint", r"(?!)", tuple(range(2, 11))),
        # a factor that the words name and the equation leaves out
        (r"twice|doubl(?:e|es|ed|ing)|hal(?:f|ves|ved|ving)|(?:2|two) times", r"(?!)", (2,)),
        (r"thrice|tripl(?:e|es|ed|ing)|thirds?|(?:3|three) times", r"(?!)", (3,)),
        (r"quadrupl(?:e|es|ed|ing)|(?:4|four) times", r"(?!)", (4,)),
        (r"(?:5|five) times", r"(?!)", (5,)),
        (r"[kmg]b|(?:kilo|mega|giga)?bytes?|bits?", r"(?!)", (8, 1000, 1024, 10**6)),
    )
)
# words that name a cycle: what comes round after so many
_CYCLES = (
    (
        re.compile(
            r"(?<![A-Za-z])(?:[ap]\.?m|o['’]?clock|noon|midnight|morning|afternoon|evening|night|clock|watch|shift)(?![A-Za-z])"
            r"|\d\s?-\s?\d+\s?=\s?\d+ (?:hours?|hrs?)\b",  # from 9-5
            re.IGNORECASE,
        ),
        (12,),
    ),
    (
        re.compile(r"\b(?:(?:mon|tues|wednes|thurs|fri|satur|sun)days?|weekdays?|days? of the week)\b", re.IGNORECASE),
        (7,),
    ),
    (
        re.compile(
            r"\b(?:January|February|March|April|May|June|July|August|September|October|November|December"
            r"|(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\b|calendar)"
        ),
        (12, 28, 29, 30, 31),
    ),
    (re.compile(r"\b(?:degrees?|angles?|rotat\w+|turns?|\w*clockwise)\b|circ\b|°", re.IGNORECASE), (360,)),
)
_ABOUT = re.compile(
    r"\b(?:about|approx\w*|around|roughly|nearly|almost|round(?:s|ed|ing)?|estimat\w+|nearest|circa|approaching|pi)\b"
    r"|\\(?:approx|sim|pi)|[≈~π]",
    re.IGNORECASE,
)
# what a difference below zero is told with: "3 - 5 = 2 below zero"
_BELOW = re.compile(
    r"\b(?:below|under|loss(?:es)?|lost|loses?|short|deficit|debts?|owes?|owed|fewer|less|lower|down|behind|decrease[ds]?|drop\w*"
    r"|distance|difference|apart|negative)\b",
    re.IGNORECASE,
)
_BOOKED_LOSS = re.compile(r"\s*\(\s*[\d.,]+\s*\)\s*")  # 7 - 9 = (2)
_ABOUT_SHARE = Fraction(1, 10)
# Nouns whose factors are all in the table; any other may be a group of some number ("boxes")
_MEASURES = re.compile(
    r"(?:second|minute|hour|day|week|month|year|inch|foot|feet|yard|mile|(?:centi|kilo)?meter|dollar|cent|pound|ounce|gram|kilogram"
    r"|cm|km|kg|m|g|mph|degree|percent|liter|gallon)(?:s|es)?"
)


class StepWords:
    """What the words of a step tell about its numbers; each is looked for once, when it is asked for."""

    def __init__(self, step: str, subject: Subject) -> None:
        self._step, self._subject = step, subject

    @cached_property
    def usual(self) -> bool:
        return self._subject.usual and unrefuted(self._step)

    @cached_property
    def about(self) -> bool:
        return bool(_ABOUT.search(self._step))

    @cached_property
    def below(self) -> bool:
        return bool(_BELOW.search(self._step))

    @cached_property
    def factors(self) -> frozenset[Fraction]:
        """Between units of the kinds that are named."""
        return frozenset(Fraction(f) for pattern, found in _FACTORS if pattern.search(self._step) for f in found)

    @cached_property
    def cycles(self) -> frozenset[int]:
        named = (length for pattern, found in _CYCLES if pattern.search(self._step) for length in found)
        return self._subject.moduli.union(named)

    @cached_property
    def inexact_quotients(self) -> bool:
        """May "17 / 5 = 2" tell a remainder, or a quotient in modular arithmetic?"""
        return bool(self._subject.moduli) or "remainder" in self._step.lower()


def holds_otherwise(left: Side, right: Side, words: StepWords, noun: str) -> bool:
    """Is there a reading of an equation, false as written, under which it may hold?

    Args:
        words: of the step that the equation is part of.
        noun: the word behind the equation.
    """
    if left.value is None or right.value is None:
        return False  # a division by zero equals nothing
    return (
        _no_numbers(left, right)
        or (words.inexact_quotients and "/" in left.tokens + right.tokens)
        or any(_equal(*values, right, left) for values in _regrouped(left, right))
        or _rounded_factors(left, right)
        or in_other_units(left.value, right.value, _slack(left, right), words, noun)
        or (left.value == -right.value and (words.below or bool(_BOOKED_LOSS.fullmatch(right.text))))
        or (words.about and abs(left.value - right.value) <= _rounding(left))
    )


def _rounding(exact: Side) -> Fraction:
    """How far a value may be rounded where a word like "about" stands."""
    assert exact.value is not None
    return max(_ABOUT_SHARE * abs(exact.value), Fraction("/" in exact.tokens))


def _slack(*sides: Side) -> Fraction:
    return max((slack(side) for side in sides if side.lone), default=Fraction(0))


def _no_numbers(left: Side, right: Side) -> bool:
    """Ratios and dates of hyphens ("6-8-10 = 3-4-5"), pages "5-10 = 6", numerals "0130", pairs "(100,200)"."""
    hyphens = [bool(_HYPHENS.fullmatch(side.text)) for side in (left, right)]
    if any(_PAIR.search(side.text) for side in (left, right)) or (all(hyphens) and _proportional(left, right)):
        return True
    for hyphen, side in zip(hyphens, (left, right), strict=True):
        if hyphen and side.value is not None and side.value < 0:
            return True
    return any(_LEADING_ZERO.match(number) for side in (left, right) for number in side.numbers)


def _proportional(left: Side, right: Side) -> bool:
    """Three terms or more, or two in the same ratio."""
    first, second = (list(map(int, side.numbers)) for side in (left, right))
    return len(first) == len(second) and (len(first) > 2 or first[0] * second[1] == first[1] * second[0])


def _equal(left: Fraction | None, right: Fraction | None, *lone: Side) -> bool:
    if left is None or right is None:
        return False
    return abs(left - right) <= _slack(*lone)


def _regrouped(left: Side, right: Side) -> Iterator[tuple[Fraction | None, Fraction | None]]:
    """The values of both sides under other rules of writing."""
    one, percent = Fraction(1), Fraction(1, 100)
    numbers = left.numbers + right.numbers
    for per_percent, rest in ((percent, True), (one, False), (one, True)):
        if rest or left.percents or right.percents:
            values = _value(left.tokens, per_percent, rest), _value(right.tokens, per_percent, rest)
            yield values
            if per_percent == one and values[0] is not None:  # "30 / 2%" is 15%
                yield from ((values[0] * scale, values[1]) for scale in (percent, 100 * one))
    if any(_GROUPED_BY_STOPS.fullmatch(number) for number in numbers):
        yield _value(_stops_as_groups(left)), _value(_stops_as_groups(right))
    if any(_CLOCK_TIME.fullmatch(number) for number in numbers):
        yield from ((_clock_value(left, whole), _clock_value(right, 60)) for whole in (1, 60))
    if any(_CLOCK_NUMBER.fullmatch(number) for number in numbers):
        yield _clock_value(left, 1), _clock_value(right, 1)
    if any(_HYPHENED.search(side.text) for side in (left, right)):
        yield _value(_without_hyphens(left)), _value(_without_hyphens(right))
    if any(_IMPLICIT_DIVISOR.search(side.text) for side in (left, right)):
        yield one, one  # read in both ways by too many


def _value(tokens: Sequence[str], percent: Fraction = Fraction(1, 100), rest: bool = False) -> Fraction | None:
    try:
        return value_of(tokens, percent=percent, divides_by_rest=rest)
    except ZeroDivisionError:
        return None


def _stops_as_groups(side: Side) -> list[str]:
    return [token.replace(".", "") if _GROUPED_BY_STOPS.fullmatch(token) else token for token in side.tokens]


def _without_hyphens(side: Side) -> tuple[str, ...]:
    return tokens_of(_HYPHENED.sub(r"(\1+\2)", side.text)) or ()


def _clock_value(side: Side, whole: int) -> Fraction | None:
    """In minutes, "9.30" and "930" being half past nine and any other whole number ``whole`` minutes; None for another
    operation.
    """
    tokens = []
    for token in side.tokens:
        if token in "*/%!":
            return None
        if clock := _CLOCK_TIME.fullmatch(token) or _CLOCK_NUMBER.fullmatch(token):
            token = str(60 * int(clock[1]) + int(clock[2]))
        elif token.isdigit():
            token = str(int(token) * whole)
        tokens.append(token)
    return _value(tokens)


def _rounded_factors(left: Side, right: Side) -> bool:
    """May a factor with two or more decimals, or a percentage, be rounded ("3.14 * 25 = 78.54", "33% * 300 = 100")?"""
    lows_highs = []
    for side in (left, right):
        following = (*side.tokens[1:], "")
        places = [
            place
            for place, (token, after) in enumerate(zip(side.tokens, following, strict=True))
            if len(token.partition(".")[2]) >= 2 or after == "%" != token
        ]
        assert side.value is not None
        values = [side.value]
        if "*" in side.tokens or "/" in side.tokens or "(" in side.tokens:
            if len(places) > MAX_ROUNDED:
                return True  # too many to try all
            for signs in itertools.product((-1, 1), repeat=len(places)):
                tokens: list[str] = list(side.tokens)
                for place, sign in zip(places, signs, strict=True):
                    tokens[place] = _nudged(tokens[place], sign)
                value = _value(tokens)
                if value is not None:
                    values.append(value)
        width = _slack(side)
        lows_highs.append((min(values) - width, max(values) + width))
    (low, high), (other_low, other_high) = lows_highs
    return low <= other_high and other_low <= high


def _nudged(number: str, sign: int) -> str:
    """The number half a unit of its last place lower or higher."""
    whole, _, decimals = number.replace(",", "").partition(".")
    scaled = int((whole or "0") + decimals) * 10 + 5 * sign
    if scaled < 0:
        return number
    digits = str(scaled).zfill(len(decimals) + 2)
    cut = len(digits) - len(decimals) - 1
    return f"{digits[:cut]}.{digits[cut:]}"


def in_other_units(left: Fraction, right: Fraction, width: Fraction, words: StepWords, noun: str) -> bool:
    """Are the sides told in two units, or one of them after a full cycle ("11 + 3 = 2 o'clock")?"""
    small, large = sorted((abs(left), abs(right)))
    width = min(width, small / 50)
    for factor in words.factors:  # either side may be the rounded one
        if abs(large / factor - small) <= width or abs(large - small * factor) <= width:
            return True
    for difference in (left - right, left + right):
        if difference and any((difference / length).denominator == 1 for length in words.cycles):
            return True
    # things told in groups of an unknown size: "24 + 24 = 4 boxes"
    if not noun or noun in NOT_A_NOUN or _MEASURES.fullmatch(noun):
        return False
    return bool(right) and (left / right).denominator == 1 and abs(left) > abs(right)

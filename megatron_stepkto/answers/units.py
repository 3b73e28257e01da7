"""Units after a value: which are comparable, and by what factor."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from megatron_stepkto.answers.text import TRIGONOMETRIC, plain_text, split_unit

# Names of a unit -> its kind and its size in that kind's base unit. "pound" is money or mass, "ton" one of two
# masses: neither is listed. A month has no fixed number of days, so years and months are a kind of their own.
_TABLE: dict[str, dict[str, str]] = {
    "length": {
        "mm millimeter millimetre": "1/1000", "cm centimeter centimetre": "1/100", "dm decimeter": "1/10",
        "m meter metre": "1", "km kilometer kilometre": "1000", "in inch inche": "127/5000",
        "ft foot feet": "381/1250", "yd yard": "1143/1250", "mi mile": "201168/125",
    },
    "mass": {
        "mg milligram": "1/1000", "g gram": "1", "kg kilogram kilo": "1000", "lb": "45359237/100000",
        "oz ounce": "45359237/1600000", "tonne": "1000000",
    },
    "time": {
        "s sec second": "1", "min minute": "60", "h hr hour": "3600", "day": "86400", "week": "604800",
    },
    "calendar": {"month": "1", "yr year": "12", "decade": "120", "century centurie": "1200"},
    "money": {"¢ cent": "1/100", "$ dollar usd buck": "1"},
    "euro": {"€ euro": "1"},
    "sterling": {"£": "1"},
    "angle": {"° degree deg": "1"},
    "radian": {"rad radian": "1"},
    "celsius": {"°c": "1"},
    "fahrenheit": {"°f": "1"},
    "volume": {
        "ml milliliter millilitre": "1/1000", "l liter litre": "1", "gal gallon": "473176473/125000000",
        "qt quart": "473176473/500000000", "pt pint": "473176473/1000000000", "cup": "473176473/2000000000",
    },
    "share": {"% percent percentage pct": "1"},
}  # fmt: skip
_KNOWN = {
    name: (kind, Fraction(size))
    for kind, units in _TABLE.items()
    for names, size in units.items()
    for name in names.split()
}
_ABBREVIATED = {"mph": "mile/hour", "kmh": "km/hour", "kph": "km/hour", "kmph": "km/hour"}
_GENERIC = frozenset(("unit", "units"))
_SIGNS = (
    (re.compile(r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|°)\s*C"), "°c"),
    (re.compile(r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|°)\s*F"), "°f"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°"), "°"),
    (re.compile(r"\\?%"), "%"),
)
_CURRENCY = re.compile(r"\s*[-+]?\s*(\\?\$|€|£)")
_SINGLE = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s*\{\s*(?P<unit>[A-Za-z]+)\s*\}(?P<power>[^A-Za-z]*)$")
_POWER = re.compile(r"\^\s*\{?\s*([23])")
_BARE = re.compile(r"[-+\d.,/(){} ]*")  # most answers
_PER = re.compile(r"\s*/\s*|\s+(?:per|an|a)\s+", re.IGNORECASE)
_HEAD = re.compile(r"\s+(?:of|in|for|left|each|on|at|to)\b.*", re.IGNORECASE)  # "cups of flour" are cups
_PART = re.compile(r"(?P<value>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]+)\.?\s*(?:,|and\b|,\s*and\b)?\s*", re.IGNORECASE)
_CLOCK = re.compile(
    r"(?P<hour>\d{1,2})(?:\s*[:.]\s*(?P<minute>\d\d))?\s*(?P<half>[ap])\.?\s*m\.?|(?P<hour24>\d{1,2})\s*:\s*(?P<minute24>\d\d)",
    re.IGNORECASE,
)
_NAMED_TIMES = {"noon": 720, "midnight": 0, "12 noon": 720, "12 midnight": 0}
MAX_CHARS = 200  # a longer answer is not a value with a unit


@dataclass(frozen=True)
class Unit:
    """``size`` in base units of ``kind``, already raised to ``power``. Kinds outside the table: "named <noun>"."""

    kind: str
    power: int
    size: Fraction

    def clashes(self, other: Unit) -> bool:
        return (self.kind, self.power) != (other.kind, other.power)

    def may_convert(self, other: Unit) -> bool:
        """Do the two clash although they could be equal: 3 pizzas and 24 slices, a year and 365 days?"""
        kinds = {self.kind, other.kind}
        open_kinds = any("named" in kind for kind in kinds) or kinds == {"calendar", "time"}
        return self.clashes(other) and (open_kinds or kinds == {"celsius", "fahrenheit"})


@lru_cache(maxsize=8192)
def unit_of(answer: str) -> Unit | None:
    r"""The unit of an answer: of ``36^\circ``, ``\$36``, ``15\mbox{ cm}^2``, ``60 mph``, ``3 apples``; else None."""
    if len(answer) > MAX_CHARS or _BARE.fullmatch(answer):
        return None
    plain = plain_text(answer)
    if currency := _CURRENCY.match(plain):
        money = "dollar" if "$" in currency[1] else currency[1]
        rate = split_unit(plain[currency.end() :].strip())[1]
        return _named(f"{money} {rate}") if _PER.match(f" {rate} ") else _known(money, 1)
    if not TRIGONOMETRIC.search(plain):
        for pattern, sign in _SIGNS:
            if re.search(rf"(?:{pattern.pattern})\s*$", plain):
                return _known(sign, 1)
    name = split_unit(_spaced(plain))[1]
    # \text{ m}: a letter that is not a variable
    if not name and (single := _SINGLE.search(answer.strip().rstrip("$."))):
        name = single["unit"] + single["power"]
    return _named(name) if name else None


def _spaced(text: str) -> str:
    return re.sub(r"\\[ ,;:!]|~|\s+", " ", text).strip()


def _named(name: str) -> Unit | None:
    """The unit of a name: 'miles per hour', 'cm ^2', 'square feet', 'red apples'."""
    name = _ABBREVIATED.get(name.lower().replace(".", ""), name)
    if "^" not in name and len(parts := _PER.split(name)) == 2 and all(parts):
        top, bottom = (_named(part) for part in parts)
        if top and bottom:
            kind = f"{top.kind}^{top.power} per {bottom.kind}^{bottom.power}"
            return Unit(kind, 1, top.size / bottom.size)
        return None
    power = 1
    if found := _POWER.search(name):
        power, name = int(found[1]), name[: found.start()]
    words = _HEAD.sub("", name.lower().replace(".", "")).split()
    for word, value in (("square", 2), ("sq", 2), ("cubic", 3), ("old", 1)):
        if word in words:
            words.remove(word)
            power = max(power, value)
    if not words or words[-1] in _GENERIC:
        return None
    known = _known(words[0], power) if len(words) == 1 else None
    return known or Unit(f"named {words[-1].removesuffix('s')}", power, Fraction(1))


def _known(name: str, power: int) -> Unit | None:
    found = _KNOWN.get(name) or _KNOWN.get(name.removesuffix("s"))
    return Unit(found[0], power, found[1] ** power) if found else None


def sum_of_quantities(answer: str) -> tuple[Fraction, str] | None:
    """``1 hour 30 minutes`` as (5400, "time"): two or more known units of one kind, in its base unit; else None."""
    text = _spaced(plain_text(answer)) if len(answer) <= MAX_CHARS else ""
    total, kinds, end, parts = Fraction(0), set(), 0, 0
    while match := _PART.match(text, end):
        unit = _known(match["unit"].lower(), 1)
        if unit is None:
            return None
        total += Fraction(match["value"]) * unit.size
        kinds.add(unit.kind)
        end, parts = match.end(), parts + 1
    return (total, kinds.pop()) if parts > 1 and end == len(text) and len(kinds) == 1 else None


def time_of_day(answer: str) -> tuple[int, bool] | None:
    """Minutes since midnight, and whether the half of the day is certain: ``4:30 PM`` is (990, True), ``4:30`` is
    (270, False); else None."""
    if len(answer) > MAX_CHARS:
        return None
    text = _spaced(plain_text(answer))
    if (named := _NAMED_TIMES.get(text.lower())) is not None:
        return named, True
    match = _CLOCK.fullmatch(text) or _CLOCK.fullmatch(text + ".")
    if not match:
        return None
    if match["half"]:
        hour, minute = int(match["hour"]), int(match["minute"] or 0)
        if not (1 <= hour <= 12 and minute < 60):
            return None
        return hour % 12 * 60 + minute + 720 * (match["half"].lower() == "p"), True
    hour, minute = int(match["hour24"]), int(match["minute24"])
    return (hour * 60 + minute, hour == 0 or hour > 12) if hour < 24 and minute < 60 else None

"""Units behind a value: which two go together, and by what factor."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from megatron_stepkto.answers.text import plain_text, split_unit

# names of a unit -> its kind and its size in that kind's base unit; "pound" is money and mass: it is in no table
_TABLE: dict[str, dict[str, str]] = {
    "length": {
        "mm millimeter millimetre": "1/1000", "cm centimeter centimetre": "1/100", "dm decimeter": "1/10",
        "m meter metre": "1", "km kilometer kilometre": "1000", "in inch inche": "127/5000",
        "ft foot feet": "381/1250", "yd yard": "1143/1250", "mi mile": "201168/125",
    },
    "mass": {"mg": "1/1000", "g gram": "1", "kg kilogram": "1000"},
    "time": {
        "s sec second": "1", "min minute": "60", "h hr hour": "3600", "day": "86400", "week": "604800",
    },
    "money": {"¢ cent": "1/100", "$ dollar usd": "1"},
    "euro": {"€ euro": "1"},
    "angle": {"° degree deg": "1"},
    "radian": {"rad radian": "1"},
    "volume": {"ml milliliter millilitre": "1/1000", "l liter litre": "1"},
    "share": {"% percent pct": "1"},
}  # fmt: skip
_KNOWN = {
    name: (kind, Fraction(size))
    for kind, units in _TABLE.items()
    for names, size in units.items()
    for name in names.split()
}
_SIGNS = ((re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°"), "°"), (re.compile(r"\\?%"), "%"))
_CURRENCY = re.compile(r"\s*[-+]?\s*(\\?\$|€)")
_SINGLE = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s*\{\s*(?P<unit>[A-Za-z]+)\s*\}(?P<power>[^A-Za-z]*)$")
_POWER = re.compile(r"\^\s*\{?\s*([23])")
_BARE = re.compile(r"[-+\d.,/(){} ]*")  # most answers
MAX_CHARS = 200  # a longer answer is no value with a unit


@dataclass(frozen=True)
class Unit:
    """``size`` in base units of ``kind``, already raised to ``power``."""

    kind: str
    power: int
    size: Fraction

    def clashes(self, other: Unit) -> bool:
        return (self.kind, self.power) != (other.kind, other.power)


@lru_cache(maxsize=8192)
def unit_of(answer: str) -> Unit | None:
    r"""The known unit of an answer: of ``36^\circ``, ``\$36``, ``15\mbox{ cm}^2``, ``5 square feet``; else None."""
    if len(answer) > MAX_CHARS or _BARE.fullmatch(answer):
        return None
    plain = plain_text(answer)
    if currency := _CURRENCY.match(plain):
        return _known("$" if "$" in currency[1] else currency[1], 1)
    for pattern, sign in _SIGNS:
        if re.search(rf"(?:{pattern.pattern})\s*$", plain):
            return _known(sign, 1)
    name = split_unit(re.sub(r"\\[ ,;:!]|~|\s+", " ", plain).strip())[1]
    if not name and (single := _SINGLE.search(answer.strip().rstrip("$."))):  # \text{ m}: a letter that is no variable
        name = single["unit"] + single["power"]
    power = 1
    if found := _POWER.search(name):
        power, name = int(found[1]), name[: found.start()]
    words = name.lower().replace(".", "").split()
    for word, value in (("square", 2), ("sq", 2), ("cubic", 3)):
        if word in words:
            words.remove(word)
            power = value
    return _known(words[0], power) if len(words) == 1 else None


def _known(name: str, power: int) -> Unit | None:
    found = _KNOWN.get(name) or _KNOWN.get(name.removesuffix("s"))
    return Unit(found[0], power, found[1] ** power) if found else None

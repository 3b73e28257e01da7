"""A cheap normal form of answers. Nothing is ever evaluated."""

from __future__ import annotations

import re
from functools import lru_cache

_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|mbox|operatorname)\s*\{([^{}]*)\}")
_ARTICLE = re.compile(r"^(?:an?|An|[tT]he) (?=[a-z]{3,})")
_FULL_STOP = re.compile(r"\s*(?<!\.)\.\s*$")  # not in 0.333...
_SPACES = re.compile(r"(?<!\\)\\[ ,;:!]|\\(?:quad|qquad)(?![a-zA-Z])|~|\s+")
_SHORT_FRACTION = re.compile(r"\\frac\s*(?:(\d)\s*(\d)|(\{[^{}]*\})\s*(\d)|(\d)\s*(\{[^{}]*\}))")
_DEGREES = re.compile(r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|°)(?:\s*[CF]\s*$)?")
# a degree sign inside a function's argument is part of the value
TRIGONOMETRIC = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc|cis)(?![a-z])")
_ESCAPED_TWICE = re.compile(r"\\\\(?=[a-zA-Z]{2,})")
_QUAD = re.compile(r"(?<=[\d)}])[\s,;]*\\q?quad(?![a-zA-Z])\s*(?=[-\d(a-zA-Z]|\\(?!text|mbox|mathrm|q?quad|[ ,;:!]))")
_THIN_COMMA = re.compile(r"(?<=\d)(?:,\s*\\!|\{\s*,\s*\})\s*(?=\d{3})")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:(?:,|\{,\}| )\d{3})+(?:\.\d+)?")
# minus, and the full-width digits and signs of Chinese text
_WIDE = str.maketrans("−０１２３４５６７８９－＋．，：％（）＝", "-0123456789-+.,:%()=")
_SIZES = re.compile(r"\\(?:left|right|displaystyle|bigl?|bigr|Bigl?|Bigr)(?![a-zA-Z])")
_FRACTION_KINDS = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_COUNTED = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
_NUMBER_WORDS = {word: str(number) for number, word in enumerate(_COUNTED.split())}
_DECIMAL = re.compile(r"([-+]?)(\d*)(?:\.(\d*))?")
# one-letter units only where LaTeX sets them upright, 5\\text{ m}: 5m may be a product
_UNIT_LETTER = re.compile(
    r"(?:(?<=[\d}])|(?<=\\pi))(?:\\[ ,;]|\s)*\\(?:text|textrm|mathrm|mbox)\s*\{\s*[mgshlL]\s*\}"
    r"(?:\^\s*\{?[23]\}?)?(?=[\s$.]*$)"
)
_UNITS = (
    "dollars?|cents?|euros?|pounds?|percent|degrees?|radians?|units?|square|cubic|sq|"
    "inch(?:es)?|in|foot|feet|ft|yards?|yd|miles?|mi|mph|mm|cm|dm|km|meters?|metres?|kilometers?|centimeters?|"
    "grams?|kg|kilograms?|ounces?|oz|lbs?|tons?|liters?|litres?|ml|gallons?|cups?|"
    "seconds?|secs?|minutes?|mins?|hours?|hrs?|days?|weeks?|months?|years? old|years?|a\\.m\\.|p\\.m\\.|"
    "points?|people|students?|ways?|per|"
    "quarts?|qt|pints?|pt|milligrams?|decades?|centur(?:y|ies)|yrs?|kph|kmh|(?:k?m|cm|ft|mi)/(?:s|h)"
)
_UNIT_TAIL = re.compile(
    rf"(?P<value>.*(?:[\d}})]|\\pi(?![a-zA-Z])))\s*(?:(?:{_UNITS})(?:\s*/\s*|\s+|$|(?=\^))(?:\^\s*\{{?[23]\}}?\s*)?)+",
    re.IGNORECASE,
)
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SCALE_WORD = re.compile(rf"\s*(?:{'|'.join(SCALES)})\b", re.IGNORECASE)
_ARITHMETIC_WORD = re.compile(
    r"\b(?:times|plus|minus|and|or|over|by|squared|cubed|half|halves|thirds?|quarters?|more|less|than|base|mod|factorial|"
    rf"{'|'.join(SCALES)})\b",
    re.IGNORECASE,
)
_NUMBER_AND_WORDS = re.compile(r"(?P<value>[-+]?[\d.,/]*\d)\s+[a-z]{3,}(?:\s+[a-z]{2,})*", re.IGNORECASE)


def _unfold_fraction(match: re.Match[str]) -> str:
    top, bottom = (part for part in match.groups() if part is not None)
    return "\\frac" + "".join(part if part.startswith("{") else f"{{{part}}}" for part in (top, bottom))


def _plain_number(text: str) -> str:
    """'025' -> '25', '27.0' -> '27', '+.50' -> '0.5', '-0' -> '0'; anything else unchanged."""
    match = _DECIMAL.fullmatch(text)
    if not match or not (match[2] or match[3]):
        return text
    whole, part = match[2].lstrip("0") or "0", (match[3] or "").rstrip("0")
    sign = "-" if match[1] == "-" and (whole != "0" or part) else ""
    return f"{sign}{whole}.{part}" if part else f"{sign}{whole}"


def unwrap(text: str) -> str:
    """Strip the delimiters of one formula: "$5$" -> "5"."""
    for opening, closing in _WRAPPERS:
        if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : -len(closing)]
            if "$" not in inner:
                return inner.strip()
    return text


def split_unit(text: str) -> tuple[str, str]:
    """Split off the name of a unit after a value: '18 dollars' -> ('18', 'dollars'), '5 cm ^2' -> ('5', 'cm ^2')."""
    match = _UNIT_TAIL.fullmatch(text) or _NUMBER_AND_WORDS.fullmatch(text)
    if not match:
        return text, ""
    end = match.end("value")
    if scale := _SCALE_WORD.match(text, end):
        end = scale.end()
    if _ARITHMETIC_WORD.search(text, end):  # "3 times as many", "5 and a half": more than a value with its unit
        return text, ""
    return text[:end].strip(), text[end:].strip()


def unescape(text: str) -> str:
    r"""Undo double escaping of commands: ``\\frac``. Not in a matrix, whose rows end with two backslashes."""
    return text if "\\begin" in text else _ESCAPED_TWICE.sub(r"\\", text)


def plain_text(answer: str) -> str:
    """The answer without math delimiters, ``\\text`` and the like, sizes of LaTeX and a full stop at the end."""
    text = _FULL_STOP.sub("", unwrap(_FULL_STOP.sub("", answer.translate(_WIDE).strip())))
    text = unescape(text)
    text = _TEXT.sub(r" \1 ", text)
    text = _SIZES.sub("", text)
    return _FRACTION_KINDS.sub(r"\\frac", text)


@lru_cache(maxsize=8192)  # a gold answer meets many samples
def normalise(answer: str) -> str:
    """A normal form in which many equal answers are the same text; equal forms differ at most in their units.

    Undone: math delimiters, ``\\text`` and similar commands, sizes and spaces of LaTeX, ``\\dfrac``, ``\\frac12``,
    currency, percent and degree signs, thousands commas, leading and trailing zeros, units after a value,
    a full stop at the end.
    """
    text = plain_text(_UNIT_LETTER.sub("", answer)).replace("\\$", "").replace("\\%", "").replace("%", "")
    text = _THIN_COMMA.sub("{,}", _QUAD.sub(", ", text))
    text = _DEGREES.sub("°" if TRIGONOMETRIC.search(text) else "", text)
    text = _SPACES.sub(" ", text).strip().strip("$€£").strip()
    text = _FULL_STOP.sub("", split_unit(text)[0])
    text = _SHORT_FRACTION.sub(_unfold_fraction, text)
    if _THOUSANDS.fullmatch(text):
        text = re.sub(r"[{,} ]", "", text)
    if not re.search(r"[A-Za-z]\s+[A-Za-z]", text):  # spaces separate words; between symbols they mean nothing
        text = re.sub(r"(?<![\d])\s+|\s+(?![\d])", "", text)
        if _THOUSANDS.fullmatch(text) and ",0" in text:  # 10, 080: no list has such a number
            text = text.replace(",", "")
    if re.fullmatch(r"\((?:[A-Z]|[-+]?[\d.]+)\)", text):  # a choice, "(073)"
        text = text[1:-1]
    text = _ARTICLE.sub("", text)
    return _NUMBER_WORDS.get(text.casefold()) or _plain_number(text)

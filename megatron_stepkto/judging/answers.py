"""Finding the final answer in a solution, and a cheap normal form of it. Nothing is ever evaluated."""

from __future__ import annotations

import re

_BOX_TOKENS = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\boxed\s+([^\s${}]+)")
# "####" is GSM8K's marker, "A:" that of the published GSM8K model solutions. Markdown may embrace the words.
_MARKERS = re.compile(
    r"\#{4}[ \t]*(?P<hash>[^\n]*)"
    r"|^[ \t]*A:[ \t]*(?P<a>[^\n]*)"
    r"|\b(?:final[ \t]+)?answer\**:\**[ \t]*\n?[ \t]*(?P<colon>[^\n]*)"
    r"|\banswer[ \t]+is:?[ \t]*(?P<is>[^\n]*)",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(r"[.!](?=\s|\**$)")


def _last_box(text: str) -> str | None:
    """Content of the closed box (\\boxed, \\fbox, \\framebox) that opens last; ``\\{`` is no brace."""
    open_braces: list[int | None] = []  # where the content of a box starts; None for another brace
    best: tuple[int, int] | None = None
    for token in _BOX_TOKENS.finditer(text):
        if token[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (best is None or start > best[0]):
                best = (start, token.start())
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0].endswith("{") and token[0] != "\\{":
            open_braces.append(token.end())
    if best:
        return text[best[0] : best[1]].strip()
    bare = _BARE_BOX.findall(text)
    return str(bare[-1]) if bare else None


def extract_answer(text: str) -> str | None:
    """The final answer that a solution states, as written; None where it states none.

    The last ``\\boxed{}`` wins; without one the last of "#### 5", "A: 5", "Answer: 5", "the answer is 5".
    """
    box = _last_box(text)
    if box is not None:
        return box or None
    found = list(_MARKERS.finditer(text))
    if not found:
        return None
    kind = found[-1].lastgroup or ""
    answer = found[-1][kind]
    if kind == "is":
        answer = _SENTENCE_END.split(answer, maxsplit=1)[0]
    if "\\boxed" in answer:  # a box that was never closed: the response was cut while it wrote its answer
        return None
    return answer.strip().strip("*").strip() or None


_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACES = re.compile(r"\\[ ,;:!]|\\(?:quad|qquad)(?![a-zA-Z])|~|\s+")
_SHORT_FRACTION = re.compile(r"\\frac\s*(?:(\d)\s*(\d)|(\{[^{}]*\})\s*(\d)|(\d)\s*(\{[^{}]*\}))")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:(?:,|\{,\}| )\d{3})+(?:\.\d+)?")
_DECIMAL = re.compile(r"([-+]?)(\d*)(?:\.(\d*))?")
# no units of one letter: 5m may be a product
_UNITS = (
    "dollars?|cents?|euros?|pounds?|percent|degrees?|radians?|units?|square|cubic|sq|"
    "inch(?:es)?|in|foot|feet|ft|yards?|yd|miles?|mi|mph|mm|cm|dm|km|meters?|metres?|kilometers?|centimeters?|"
    "grams?|kg|kilograms?|ounces?|oz|lbs?|tons?|liters?|litres?|ml|gallons?|cups?|"
    "seconds?|secs?|minutes?|mins?|hours?|hrs?|days?|weeks?|months?|years? old|years?|a\\.m\\.|p\\.m\\.|"
    "points?|people|students?|ways?|per"
)
_UNIT_TAIL = re.compile(
    rf"(?P<value>.*[\d}})])\s*(?:(?:{_UNITS})(?:\s*/\s*|\s+|$|(?=\^))(?:\^\s*\{{?[23]\}}?\s*)?)+",
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


def _unwrap(text: str) -> str:
    for opening, closing in _WRAPPERS:
        if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : -len(closing)]
            if "$" not in inner:
                return inner.strip()
    return text


def without_unit(text: str) -> str:
    """Drop what names a unit after a value: '18 dollars' -> '18', '5 cm ^2' -> '5'."""
    match = _UNIT_TAIL.fullmatch(text) or _NUMBER_AND_WORDS.fullmatch(text)
    return match["value"].strip() if match else text


def normalise(answer: str) -> str:
    """A normal form in which many equal answers are the same text; equal forms differ at most in their units.

    Undone: math delimiters, ``\\text`` and its kin, sizes and spaces of LaTeX, ``\\dfrac``, ``\\frac12``,
    currency, percent and degree signs, thousands commas, leading and trailing zeros, units after a value,
    a full stop at the end.
    """
    text = answer.strip().rstrip(".").strip()
    text = _unwrap(text).rstrip(".").strip()
    text = _TEXT.sub(r" \1 ", text)
    text = re.sub(r"\\(?:left|right|displaystyle|bigl?|bigr|Bigl?|Bigr)(?![a-zA-Z])", "", text)
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = text.replace("−", "-").replace("\\$", "").replace("\\%", "").replace("%", "")
    text = _SPACES.sub(" ", _DEGREES.sub("", text)).strip().lstrip("$€£").strip()
    text = without_unit(text).rstrip(".")
    text = _SHORT_FRACTION.sub(_unfold_fraction, text)
    if _THOUSANDS.fullmatch(text):
        text = re.sub(r"[{,} ]", "", text)
    if not re.search(r"[A-Za-z]\s+[A-Za-z]", text):  # spaces part words; between symbols they mean nothing
        text = re.sub(r"(?<![\d])\s+|\s+(?![\d])", "", text)
    if re.fullmatch(r"\((?:[A-Z]|[-+]?[\d.]+)\)", text):  # a choice, "(073)"
        text = text[1:-1]
    return _plain_number(text)

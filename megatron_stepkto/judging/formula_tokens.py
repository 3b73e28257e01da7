"""Tokens of formulas in LaTeX or plain text."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""\s+
    |(?P<number>\d{1,3}(?:(?:,\\!|\{,\}(?:\\!)?|,)\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)
    |\\(?:text|mbox|textrm|mathrm|textbf|textit|operatorname)\s*\{(?P<words>[^{}]*)\}
    |\\(?P<command>[a-zA-Z]+)
    |\\(?P<spacing>[,;:! ])
    |\\(?P<escaped>.)
    |(?P<letter>[a-zA-Z])
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_DROPPED = frozenset((
    "left", "right", "displaystyle", "textstyle", "limits", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl",
    "Bigr", "boxed",
))  # fmt: skip
_SIGNS = {
    "×": "*", "·": "*", "⋅": "*", "∙": "*", "−": "-", "–": "-", "÷": "/", r"\times": "*", r"\cdot": "*", r"\div": "/",
    r"\%": "%", r"\{": "(", r"\}": ")", r"\lvert": "|", r"\rvert": "|", r"\vert": "|", r"\dfrac": r"\frac",
    r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\dbinom": r"\binom", r"\tbinom": r"\binom", "π": r"\pi", r"\ast": "*",
    r"\degree": "°", r"\lbrack": "[", r"\rbrack": "]",
}  # fmt: skip


@dataclass(frozen=True)
class Token:
    text: str  # "\frac", "12", "x", "+"; "\text" with ``words``
    start: int
    words: str = ""
    number: bool = False


def tokenize(text: str, start: int = 0) -> list[Token]:
    """Tokens of a text; ``start`` is added to their positions. Spacing is dropped."""
    tokens = []
    for match in _TOKEN.finditer(text):
        kind, position = match.lastgroup, start + match.start()
        if kind is None or kind == "spacing" or match["other"] in ("~", "$", "&"):
            continue
        if kind == "words":
            tokens.append(Token(r"\text", position, match["words"].strip()))
        elif kind == "number":
            tokens.append(Token(re.sub(r"[^\d.]", "", match[0]), position, number=True))
        elif match[0] != r"\$" and match["command"] not in _DROPPED:
            tokens.append(Token(_SIGNS.get(match[0], match[0]), position))
    return tokens

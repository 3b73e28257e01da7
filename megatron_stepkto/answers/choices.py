"""Which letter of a multiple-choice question an answer names."""

from __future__ import annotations

import re

from megatron_stepkto.answers.text import plain_text

_BARE = re.compile(r"\(?([A-J])\)?[.:)]?", re.ASCII)
# a letter that is neither part of a word or formula, nor the article "A", nor the pronoun "I"
_LETTER = re.compile(
    r"(?<![A-Za-z0-9\\$_^'=*+/<>-])(?:[B-HJ]|A(?! (?!or\b|and\b)[a-z])|(?<=\()I(?=\)))(?![A-Za-z0-9_^='*+/<>-])",
    re.ASCII,
)
_NEGATED = re.compile(r"(?:\bnot|n't\b[^.,;:]{0,40}|\bnon|\bneither|\bnor|不是)\s*\(?$", re.IGNORECASE)
_OR = re.compile(r"\)?\s*(?:or|nor|and|,)\s*\(?", re.IGNORECASE)
_WITH_VALUE = re.compile(
    r"(?:\((?P<letter>[A-J])\)|(?P<plain>[A-J])[.:)]) *(?:\\[ ,;:!~])*[:=]?\s*(?P<value>\S.*)", re.DOTALL
)
# after a first letter, others: ", (C)", "and C", "(C)"
_MORE_LETTERS = re.compile(r"(?:\s*(?:(?:,|;|&|and\b|or\b)\s*)+\(?[A-J]\)?|\s*\([A-J]\))+")
MAX_CHARS = 1000


def bare_choice(form: str) -> str | None:
    """The letter of an answer that is one: 'B', '(B)', 'B.'."""
    match = _BARE.fullmatch(form)
    return match[1] if match else None


def choice_and_value(answer: str) -> tuple[str, str] | None:
    r"""Letter and value of an answer with both: of ``\textbf{(D)}\ 12``, ``(D) 12``, ``D. 12``; else None, also of
    several letters, ``(A), (C)``."""
    if len(answer) > MAX_CHARS:
        return None
    match = _WITH_VALUE.fullmatch(plain_text(answer).strip())
    if match is None or _MORE_LETTERS.fullmatch(match["value"].strip()):
        return None
    return match["letter"] or match["plain"], match["value"].strip()


def without_choice(gold: str, answer: str) -> tuple[str, str]:
    """The values of two answers of which one has a letter before its value."""
    one, other = choice_and_value(gold), choice_and_value(answer)
    return (one[1] if one and not other else gold), (other[1] if other and not one else answer)


def named_choice(text: str) -> str | None:
    """The one letter that a text names, ignoring "not A" and "can't be A or B"; None where it names none or several."""
    if len(text) > MAX_CHARS:
        return None
    named: set[str] = set()
    negated, last_end = False, 0
    for match in _LETTER.finditer(text):
        chained = last_end > 0 and _OR.fullmatch(text, last_end, match.start()) is not None
        negated = (chained and negated) or _NEGATED.search(text[max(0, match.start() - 60) : match.start()]) is not None
        last_end = match.end()
        if not negated:
            named.add(match[0])
    return named.pop() if len(named) == 1 else None

"""Where one step of a solution ends and the next begins, on characters alone.

Cuts are positions in the text, so the steps join to the exact text. A rule never cuts inside ``[asy]`` code, a
fenced code block or displayed mathematics that is closed; ``sentence`` nor inside inline mathematics. An
opener that is not closed (within a bound) protects nothing: one stray ``\\[`` must not swallow a solution.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal, get_args

from megatron_stepkto.base.errors import UserError

SplitRule = Literal["line", "blank_line", "step_number", "step_heading", "sentence", "tag"]
SPLIT_RULES: tuple[str, ...] = get_args(SplitRule)

_SEPARATORS = {"line": re.compile(r"\n"), "blank_line": re.compile(r"\n(?:[^\S\n]*\n)+")}
# Markdown's bold and list marks may precede the word.
_OPENERS = {
    "step_number": re.compile(r"^[ \t]*(?:#{1,6}[ \t]*|[-*•][ \t]+)?(?:\*\*|__)?step[ \t]+\d+", re.I | re.M),
    "step_heading": re.compile(r"^[ \t]*#{1,6}[ \t]*(?:\*\*|__)?step\b", re.I | re.M),
}

# --- what must stay whole --------------------------------------------------------------------------------------

MAX_PROTECTED_CHARS = 8000
_OPEN = re.compile(r"\[asy\]|```|\\\[|\$\$|\\begin\{(\w{1,20}\*?)\}")
_OPEN_INLINE = re.compile(_OPEN.pattern + r"|\\\(|(?<!\\)\$(?=\S)")
_CLOSERS = {"[asy]": "[/asy]", "```": "```", "\\[": "\\]", "$$": "$$", "\\(": "\\)"}
# Pandoc's rule for dollars, so that "$5. He pays $6" is not a formula; a blank line always ends one.
_INLINE_DOLLAR = re.compile(r"(?:(?!\n\s*\n)[^$]){0,500}(?<=[^\s\\])\$(?!\d)")


def protected_spans(text: str, *, inline: bool = False) -> list[tuple[int, int]]:
    """Half-open spans, ordered and disjoint, of closed code and displayed (``inline``: any) mathematics."""
    spans: list[tuple[int, int]] = []
    position = 0
    absent: set[str] = set()  # closers that are absent from the rest of the text: searched for once
    pattern = _OPEN_INLINE if inline else _OPEN
    while match := pattern.search(text, position):
        position = match.end()
        opener = match[0]
        if opener == "$":
            if inline_end := _INLINE_DOLLAR.match(text, position):
                position = inline_end.end()
                spans.append((match.start(), position))
            continue
        closer = _CLOSERS.get(opener) or f"\\end{{{match[1]}}}"
        if closer in absent:
            continue
        end = text.find(closer, position)
        if end < 0:
            absent.add(closer)
        elif end - position <= MAX_PROTECTED_CHARS:
            position = end + len(closer)
            spans.append((match.start(), position))
    return spans


# --- sentences -------------------------------------------------------------------------------------------------

# What may close a formula, a quotation or bold type after the full stop.
_AFTER_STOP = r"(?:\s{0,2}(?:\\[\])]|\$\$)|[$\"')\]}”’»*])*"
_END = re.compile(rf"(?:[.!?]+{_AFTER_STOP}(?=\s|$)|[。！？]+[”’」』）]*)")
_BREAK = re.compile(
    r"\n(?:[^\S\n]*\n)+|\n(?=[ \t]*(?:[-*•][ \t]|#{1,6}[ \t]|\(?\d{1,3}[.)][ \t]|\(?[a-zA-Z][.)][ \t]))"
)
_ABBREVIATION = re.compile(
    r"(?:\b(?:mr|mrs|ms|dr|prof|st|jr|sr|vs|cf|approx|resp|e\.g|i\.e|w\.r\.t|s\.t|a\.k\.a)|\\left|\\right)\.$",
    re.IGNORECASE,
)
_BEFORE_NUMBER = re.compile(  # "the answer is no." ends a sentence, "No. 5" does not
    r"\b(?:no|nos|figs?|eqs?|eqn|ch|sec|thm|ex|def|prop|lem|p|pp|vol"
    r"|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)\.$",
    re.IGNORECASE,
)
_SPACE = re.compile(r"\s*")
# Shorter than _LOOK_BEHIND, so that ^ is the start of the text or matches nothing.
_ENUMERATION = re.compile(r"(?:^|\n)[ \t>*#_-]{0,8}\(?(?:\d{1,3}|[a-zA-Z]|[ivx]{1,4})\.$", re.IGNORECASE)
_INITIAL, _INITIALS = re.compile(r"\b[A-Z]\.$"), re.compile(r"\b[A-Z]\.[ ]?[A-Z]\.$")
_LOOK_BEHIND = 24
_CONTINUES = frozenset("=+*/<>^,;:)]}%")  # after a factorial or an abbreviation


def _sentence_cuts(text: str) -> Iterator[int]:
    spans = protected_spans(text, inline=True)
    candidates = [(m.end(), _sentence_cut(text, m)) for m in _END.finditer(text)]
    candidates += [(m.end(), m.end()) for m in _BREAK.finditer(text)]
    for end, cut in sorted(candidates):
        if cut is not None and not _inside(spans, end):
            yield cut


def _sentence_cut(text: str, end: re.Match[str]) -> int | None:
    """Where to cut after a full stop: spaces open the next sentence, as in its first token; line breaks do not."""
    after = _SPACE.match(text, end.end())
    assert after is not None
    following = text[after.end() : after.end() + 4]
    if following and end[0][0] in ".!?":
        if following[0].islower() or following[0] in _CONTINUES:
            return None
        if end[0] == "." and _abbreviates(text[max(0, end.start() - _LOOK_BEHIND) : end.end()], following):
            return None
    newline = text.rfind("\n", end.end(), after.end())
    return newline + 1 if newline >= 0 else end.end()


def _abbreviates(before: str, following: str) -> bool:
    """Is the full stop that ends ``before`` part of a word, of initials or of a list item's number?"""
    if _ABBREVIATION.search(before) or (_BEFORE_NUMBER.search(before) and following[0].isdigit()):
        return True
    if _INITIALS.search(before) or (_INITIAL.search(before) and re.match(r"[A-Z]\.", following)):
        return True
    return bool(_ENUMERATION.search(before))


# --- all rules -------------------------------------------------------------------------------------------------


def _inside(spans: list[tuple[int, int]], cut: int) -> bool:
    number = bisect.bisect_right(spans, (cut, 0)) - 1
    return number >= 0 and spans[number][0] < cut < spans[number][1]


def _cuts(text: str, how: SplitRule, tag: str | None) -> list[int]:
    if how == "tag":
        if not tag:
            raise UserError("judge.split is tag: expected judge.step_tag, the text that ends a step")
        # white space up to the line's end belongs to the tag, the next step's first space to that step
        return [match.end() for match in re.finditer(re.escape(tag) + r"(?:[^\S\n]*\n)*", text)]
    if how == "sentence":
        return list(_sentence_cuts(text))
    if how in _SEPARATORS:
        cuts = [match.end() for match in _SEPARATORS[how].finditer(text)]
    elif how in _OPENERS:
        cuts = [match.start() for match in _OPENERS[how].finditer(text)]
    else:
        raise UserError(f"judge.split: expected one of {', '.join(SPLIT_RULES)}, got {how!r}")
    spans = protected_spans(text)
    return [cut for cut in cuts if not _inside(spans, cut)]


def split_text(text: str, how: SplitRule, tag: str | None = None) -> list[tuple[int, int]]:
    """Half-open character spans of the steps; joined they are the text, character for character.

    - ``line`` ends a step at a newline, ``blank_line`` at one or more blank lines (a line of spaces is blank).
    - ``step_number`` begins one at a line that starts with "Step 3" (also "## Step 3", "**Step 3"),
      ``step_heading`` only at a heading, "## Step 3".
    - ``sentence`` ends one after a full stop that ends a sentence: not in decimals, abbreviations,
      enumerations, factorials or mathematics.
    - ``tag`` ends one after the text ``tag``, which the model was trained to write.

    The separator belongs to the step it closes. A piece of white space alone joins the step before it, at
    the start the first step. No span is empty, except that the empty text is one empty step.

    Raises:
        UserError: unknown rule, or ``tag`` without a tag.
    """
    return spans_of_cuts(text, _cuts(text, how, tag))


def spans_of_cuts(text: str, cuts: list[int]) -> list[tuple[int, int]]:
    """Spans between cuts (any order, repeats allowed), pieces of white space joined as in ``split_text``."""
    edges = sorted({0, len(text), *cuts})
    if len(edges) == 1:
        return [(0, 0)]
    spans: list[tuple[int, int]] = []
    start = 0
    for piece_start, cut in pairwise(edges):
        if spans and text[piece_start:cut].isspace():
            spans[-1] = (spans[-1][0], cut)
            start = cut
        elif cut == len(text) or not text[start:cut].isspace():
            spans.append((start, cut))
            start = cut
    return spans

r"""The boxes in which a solution states its answer: ``\boxed{5}``, ``\fbox{5}``, ``\framebox{5}``, ``\boxed 5``."""

from __future__ import annotations

import re
from typing import NamedTuple

_BOX_TOKENS = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
# only before something on the same line that can be a value: "write \boxed" at the end of a line quotes the prompt
_BARE_BOX = re.compile(
    r"\\boxed[ \t]*(?=[-+]?\d|\\[a-zA-Z]|\((?=[-\d])|[A-Zb-z](?![A-Za-z']))(?P<content>(?:[^\s${}]|\{[^{}\n]*\})+)"
)
# What may separate two boxes that state one answer together: "\boxed{1} and \boxed{2}", "... bins and b = ...".
# Not "or": it also joins two spellings of one answer.
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;]|\\[()\[\]]|\\q?quad|\\text\s*\{\s*and\s*\}|\b(?:[a-z]+ )?and\b)*"
    r"(?:[A-Za-z](?:_\{?\w{1,3}\}?)?\s*=\s*)?"
)
_INNER_DOLLAR = re.compile(r"(?<!\\)\$")
_BLANK = re.compile(
    r"(?:[\s?._…~*-]|\\(?:[ ,;:!_?]|(?:l|c|d|v)?dots|q?quad|square|underline|hspace)(?![a-zA-Z])|[{}])*"
)
_COMMANDS = re.compile(r"\\[a-zA-Z]+|[^A-Za-z]+")
_PLACEHOLDERS = frozenset(("answer", "number", "result", "value", "expression", "here"))
_AROUND_PLACEHOLDERS = ("your", "the", "a", "my", "final", "correct", "numerical", "numeric", "goes", "insert", "put")
_PROMPT_WORDS = _PLACEHOLDERS.union(_AROUND_PLACEHOLDERS)


class Box(NamedTuple):
    """A closed box and where it stands in the text; ``quoted``: in back-ticks, as code."""

    start: int
    end: int
    content: str
    quoted: bool


def is_placeholder(content: str) -> bool:
    r"""Whether a box or a line holds a prompt's placeholder, not an answer: "", "?", "...", "your answer"."""
    if len(content) > 60:
        return False
    if _BLANK.fullmatch(content):
        return True
    words = _COMMANDS.sub(" ", content).lower().split()
    return (
        not any(c.isdigit() for c in content)
        and not _PLACEHOLDERS.isdisjoint(words)
        and _PROMPT_WORDS.issuperset(words)
    )


def last_boxed(text: str) -> Box | None:
    r"""The box that opens last. Placeholders and unclosed boxes are ignored, and quoted boxes where there are others.

    Boxes separated only by "and" or a comma form one list, which is its content. ``\{`` does not count as a brace.
    """
    boxes = [box for box in _boxes(text) if not is_placeholder(box.content)]
    boxes = [box for box in boxes if not box.quoted] or boxes[-1:]
    if not boxes:
        return None
    contents: list[str] = []
    following = len(text)
    for box in reversed(boxes):
        if contents and (box.end > following or not _BETWEEN_BOXES.fullmatch(text, box.end, following)):
            break
        contents.append(box.content)
        following = box.start
    # the same answer may be boxed twice
    answer = contents[0] if len(set(contents)) == 1 else ", ".join(reversed(contents))
    return boxes[-1]._replace(content=answer)


def _boxes(text: str) -> list[Box]:
    """Every closed box, in the order in which they open."""
    if "\\" not in text:
        return []
    spans = []
    for bare in _BARE_BOX.finditer(text):
        end = bare.start("content") + len(bare["content"].rstrip(".,;:"))
        spans.append((bare.start(), bare.start("content"), end, end))
    open_braces: list[tuple[int, int] | None] = []  # where a box and its content start; None for another brace
    for token in _BOX_TOKENS.finditer(text):
        if token[0] == "}":
            box = open_braces.pop() if open_braces else None
            if box is not None:
                spans.append((*box, token.start(), token.end()))
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0].endswith("{") and token[0] != "\\{":
            open_braces.append((token.start(), token.end()))
    return [
        Box(start, end, _INNER_DOLLAR.sub("", text[inner:inner_end]).strip(), _in_back_ticks(text, start, end))
        for start, inner, inner_end, end in sorted(spans)
    ]


def _in_back_ticks(text: str, start: int, end: int) -> bool:
    return text[max(0, start - 2) : start].rstrip("$").endswith("`") and text[end : end + 2].lstrip("$").startswith("`")

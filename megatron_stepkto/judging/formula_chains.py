r"""The chains of formulas in a solution: ``$x = 2y = 6$``, the rows of an environment, ``5x = 810`` in plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_stepkto.judging.formula_parser import Formula, parse
from megatron_stepkto.judging.formula_tokens import Token, tokenize
from megatron_stepkto.judging.formula_values import Unreadable

MAX_CHARS = 30_000  # of a solution; a longer one is not read
MAX_FORMULA = 3000  # characters between two delimiters
_DRAWING = re.compile(r"\[asy\].*?(?:\[/asy\]|\Z)", re.DOTALL)
_ANNOTATION = re.compile(r"<<[^<>\n]{0,200}>>")
_ROWS = "align|gather|eqnarray|equation|multline|aligned|gathered|split|flalign|alignat"
_MATH = re.compile(
    rf"\$\$(?P<a>[^$]{{1,{MAX_FORMULA}}})\$\$"
    rf"|\\\[(?P<b>(?:(?!\\\[|\\\]).){{1,{MAX_FORMULA}}})\\\]"
    rf"|\\\((?P<c>(?:(?!\\\(|\\\)).){{1,{MAX_FORMULA}}})\\\)"
    rf"|\\begin\{{(?P<rows>(?:{_ROWS})\*?)\}}(?P<d>(?:(?!\\end\{{).|\\end\{{(?!(?P=rows))){{1,{MAX_FORMULA}}}?)\\end\{{(?P=rows)\}}"
    rf"|(?<!\\)\$(?P<e>(?:[^$\\\n]|\\.|\n(?!\s*\n)){{1,{MAX_FORMULA}}})\$",
    re.DOTALL,
)
_INNER_ROWS = re.compile(rf"\\(?:begin|end)\{{(?:{_ROWS})\*?\}}(?:\{{\d\}})?")
_UNREAD = re.compile(
    r"\?|\\begin\{|\.\.\.|\\(?:equiv|pmod|bmod|pm|mp|ldots|cdots|dots|dotsb|mathbf|vec|cup|cap)(?![a-zA-Z])"
)
_CURRENCY = re.compile(r"\$\s*-?[\d.]")
# Plain text: numbers, signs and single letters; a word ends it
_PLAIN = re.compile(
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+|(?<![A-Za-z'’\\])[A-Za-z](?![A-Za-z'’])"
    r"|\\(?:times|cdot|div|[dt]?frac|sqrt|pi|binom|left|right|boxed|approx|[,;!%$])(?![a-zA-Z])|[-+*/^()%=≈×·÷−²³ \t$]"
    r"|(?<=[}\]])\{|(?<=frac)\{|(?<=sqrt)\{|(?<=binom)\{|(?<=boxed)\{|(?<=\^)\{|\})+"
)
_CUT_BEFORE = re.compile(r"(?:\\[a-zA-Z]+\s*|[\\_^{\[|√∛#@&~])$")
_CUT_AFTER = re.compile(r"[!\\_^{\[|√∛#@&~]|\.\d")
_PLAIN_TIMES = re.compile(r"(?<=[\d)%])(?<!0)([ \t]*)[xX](?=[ \t]*\$?[\d.(])|(?<=[ \t])[xX](?=[ \t]+\$?\d)")
EQUALS = ("=", r"\approx", "≈", r"\doteq")
_RELATIONS = frozenset((
    *EQUALS, "<", ">", ":", r"\le", r"\leq", r"\ge", r"\geq", r"\ne", r"\neq", r"\sim", r"\cong", r"\in", r"\to",
    r"\subset", r"\mid", r"\parallel", r"\perp", r"\leqslant", r"\geqslant", r"\equiv", r"\propto",
))  # fmt: skip
_BREAKS = frozenset((
    ",", ";", ".", r"\quad", r"\qquad", r"\hspace", r"\vspace", r"\therefore", r"\because", r"\implies", r"\iff",
    r"\Rightarrow", r"\Longrightarrow", r"\Leftrightarrow", r"\Longleftrightarrow", r"\Leftarrow", r"\rightarrow",
    r"\longrightarrow",
))  # fmt: skip
_SUMS = frozenset(("+", "-", "*", r"\cdot", r"\times"))
_WORDS = re.compile(r"\b(?:and|or|if|for|so|where|since|when|because|then|thus|is|are|by|as|with)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Chain:
    """Sides and the relations between them. A side that could not be read is None."""

    sides: tuple[Formula | None, ...]
    relations: tuple[Token, ...]
    start: int
    end: int
    whole: bool  # it fills its formula, or its piece of a list: nothing unread is next to it


def chains(text: str) -> Iterator[Chain]:
    """The chains of a solution with at least one relation, in the order of the text."""
    if len(text) > MAX_CHARS:
        return
    text = _DRAWING.sub(_blank, text)
    text = _ANNOTATION.sub(_blank, text)
    money = "\\" not in text and all(_CURRENCY.match(text, m.start()) for m in re.finditer(r"\$", text))
    last = 0
    for match in () if money else _MATH.finditer(text):
        yield from _in_plain(text, last, match.start())
        last = match.end()
        group = next(name for name in "abcde" if match[name] is not None)
        yield from _in_latex(match[group], match.start(group))
    yield from _in_plain(text, last, len(text))


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def _in_latex(formula: str, start: int) -> Iterator[Chain]:
    if not re.search(r"=|≈|\\(?:approx|doteq)", formula):
        return
    formula = _INNER_ROWS.sub(_blank, formula)
    yield from _split(_rows_joined(tokenize(formula.replace(r"\\", "\x00 "), start)), plain=False)


def _rows_joined(tokens: list[Token]) -> list[Token]:
    """A row that begins with a relation goes on with the one before; any other is a piece of its own."""
    joined = []
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.text == "\x00":
            if following is not None and following.text in _RELATIONS:
                continue
            token = Token(";", token.start)
        joined.append(token)
    return joined


def _in_plain(text: str, start: int, end: int) -> Iterator[Chain]:
    for match in _PLAIN.finditer(text, start, end):
        run = match[0]
        if not any(sign in run for sign in ("=", "≈", r"\approx")) or len(run) > MAX_FORMULA:
            continue
        run = run.replace("**", "  ").replace("²", "^2").replace("³", "^3") if re.search(r"\*\*|[²³]", run) else run
        tokens = tokenize(_PLAIN_TIMES.sub(r"\1*", run), match.start())
        # a side that something unread takes part in is not read either
        if _CUT_BEFORE.search(text[max(0, match.start() - 20) : match.start()]):
            tokens.insert(0, Token("?", match.start()))
        if _CUT_AFTER.match(text, match.end()):
            tokens.append(Token("?", match.end()))
        yield from _split(tokens, plain="\\" not in run)


def _split(tokens: list[Token], plain: bool) -> Iterator[Chain]:
    """The pieces between commas, arrows and words, each of sides and relations."""
    piece: list[Token] = []
    depth = 0
    continues = False  # after a break the piece may go on with a sum that is cut there
    for token in [*tokens, Token(";", -1)]:
        depth += (token.text in ("(", "[", "{")) - (token.text in (")", "]", "}"))
        words = token.text == r"\text" and bool(_WORDS.search(token.words))
        if (depth <= 0 and (token.text in _BREAKS or words)) or token.start == -1:
            if piece and (found := _chain(piece, plain)):
                yield replace(found, whole=False) if continues and piece[0].text in _SUMS else found
            piece, continues = [], True
        else:
            piece.append(token)


def _chain(piece: list[Token], plain: bool) -> Chain | None:
    sides: list[list[Token]] = [[]]
    relations = []
    depth = 0
    for token in piece:
        depth += (token.text in ("(", "[", "{")) - (token.text in (")", "]", "}"))
        if depth == 0 and token.text in _RELATIONS:
            relations.append(token)
            sides.append([])
        else:
            sides[-1].append(token)
    if not any(relation.text in EQUALS for relation in relations):
        return None
    if any(relation.text in (r"\equiv", ":", r"\propto") for relation in relations):
        return None
    read = tuple(_side(side, plain) for side in sides)
    end = piece[-1].start + len(piece[-1].text)
    whole = all(side is not None for side in read) and piece[-1].text != "!"  # an exclamation mark, or a factorial
    return Chain(read, tuple(relations), piece[0].start, end, whole)


def _side(tokens: list[Token], plain: bool) -> Formula | None:
    if any(_UNREAD.match(token.text) for token in tokens):
        return None
    try:
        return parse(tokens, plain)
    except Unreadable:
        return None

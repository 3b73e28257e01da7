"""Parse an answer into a form: a scalar, a list, a set, a tuple, an interval, an assignment, a relation.

Only the structure is parsed, and nothing is evaluated. A scalar stays LaTeX; ``forms`` compares.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_stepkto.answers.text import normalise


class Unreadable(Exception):
    """The answer is prose, or its notation is ambiguous."""


@dataclass(frozen=True)
class Scalar:
    """One expression, as LaTeX."""

    text: str


@dataclass(frozen=True)
class Literal:
    """A part that is not a formula, in lower case: equal only to itself."""

    text: str


@dataclass(frozen=True)
class Many:
    """Several values. ``brackets`` of a tuple are its own: "()", "[)", ...; a bare list has none and no order."""

    kind: typing.Literal["list", "set", "tuple"]
    items: tuple[Form, ...]
    brackets: str = ""


@dataclass(frozen=True)
class Assigned:
    """``name = value`` in the order written; a name with several values is repeated."""

    pairs: tuple[tuple[str, Form], ...]


@dataclass(frozen=True)
class Relation:
    """A chain of LaTeX sides: ``-2 < x < 3`` has the operators ``<`` and ``<``."""

    sides: tuple[str, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Combined:
    r"""Sets joined by ``\cup``, ``\cap`` or ``\setminus``; ``,`` joins inequalities without a stated operator."""

    operator: str
    parts: tuple[Form, ...]


@dataclass(frozen=True)
class Reals:
    """The whole real line."""


@dataclass(frozen=True)
class Cells:
    """A matrix or a column vector."""

    rows: tuple[tuple[Form, ...], ...]


@dataclass(frozen=True)
class Ratio:
    """``2:3:4``."""

    items: tuple[Form, ...]


Form = Scalar | Literal | Many | Assigned | Relation | Combined | Reals | Cells | Ratio
EMPTY = Many("set", ())

_SIGNS = str.maketrans(
    {
        "π": r"\pi ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ",
        "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "∅": r"\emptyset ", "±": r"\pm ",
        "∈": r"\in ", "²": "^2", "³": "^3", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}", "ℝ": r"\mathbb{R}", "≈": r"\approx ", "…": "...", "θ": r"\theta ", "∨": r"\lor ",
        "∧": r"\land ", "{": "{", "–": "-", "∖": r"\setminus ",
    }
)  # fmt: skip
# Alternative spellings -> the one that this parser and latex2sympy know. Order matters.
_SPELLINGS = tuple(
    (re.compile(pattern, re.IGNORECASE if word else 0), spelling)
    for word, pattern, spelling in (
        (False, r"√\s*(\d+|[a-z])", r"\\sqrt{\1}"),
        (False, r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (False, r"(?<!\\)\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (False, r"(?<![\\a-zA-Z])(sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp)(?![a-z])", r"\\\1 "),
        (False, r"\*\*", "^"),
        (False, r"\*", r"\\cdot "),
        (False, r"\\operatorname\s*\{\s*cis\s*\}|(?<![a-zA-Z])\\?cis(?![a-z])", r"\\cis "),
        (False, r"\\varnothing|\\O(?![a-zA-Z])|\\not?hing(?![a-z])", r"\\emptyset"),
        (False, r"\\(?:Bbb|mathbb|mathbf|R)\s*\{?\s*R\s*\}?|\\R(?![a-zA-Z])|\\Re(?![a-zA-Z])", r"\\reals "),
        (False, r"\\(?:leqslant|leqq|leq|le)(?![a-z])|<=|=<", r"\\le "),
        (False, r"\\(?:geqslant|geqq|geq|ge)(?![a-z])|>=|=>", r"\\ge "),
        (False, r"\\(?:neq|ne)(?![a-z])|!=|\\not\s*=|/=", r"\\ne "),
        (False, r"\\lt(?![a-z])", "<"),
        (False, r"\\gt(?![a-z])", ">"),
        (False, r"\\(?:bigcup|cup)(?![a-z])", r"\\cup "),
        (False, r"\\backslash|\\smallsetminus", r"\\setminus "),
        (False, r"\\(?:lor|vee)(?![a-z])", " or "),
        (False, r"\\(?:land|wedge)(?![a-z])", " and "),
        (False, r"\\(?:imath|mathrm\{i\})(?![a-z])", "i"),
        (False, r"\\(?:lbrace|lbrack)(?![a-z])", lambda m: r"\{" if "brace" in m[0] else "["),
        (False, r"\\(?:rbrace|rbrack)(?![a-z])", lambda m: r"\}" if "brace" in m[0] else "]"),
        (False, r"\\[dt]binom(?![a-z])", r"\\binom"),
        (False, r"\\colon(?![a-z])", ":"),
        (False, r"\\(?:cdotp|bullet|ast)(?![a-z])", r"\\cdot "),
        (False, r"\{,\}|(?<=\d),\s*\\!\s*(?=\d{3})", ""),
        (True, r"\b(?:is|are)?\s*(?:less than or equal to|at most|no more than|not greater than)\b", r" \\le "),
        (True, r"\b(?:is|are)?\s*(?:(?:greater|more) than or equal to|at least|no less than|not less than)\b",
         r" \\ge "),
        (True, r"\b(?:is|are)?\s*(?:strictly )?(?:less|smaller) than\b", " < "),
        (True, r"\b(?:is|are)?\s*(?:strictly )?(?:greater|more|larger) than\b", " > "),
        (True, r"\b(?:is )?not equal(?: to)?\b", r" \\ne "),
        (True, r"\bplus or minus\b", r" \\pm "),
        (False, r"_(\d+)\s+(?=\d)", r"_{\1} "),
        (True, r"(?<!\\)\b(?:the )?(?:set of )?(?:all )?(?:real numbers|reals)\b", r" \\reals "),
        (True, r"\ball real\b(?: values(?: of [a-z])?)?", r" \\reals "),
        (True, r"\b(?:except|excluding|but not|other than)(?: for)?\b", r" \\setminus "),
        (True, r"\bunion\b", r" \\cup "),
        (True, r"(?<!\\)\b(?:positive )?infinity\b", r" \\infty "),
        (True, r"(?<!\\)\bpi\b", r" \\pi "),
        (True, r"\b(?:equals|is equal to)\b", " = "),
    )
)  # fmt: skip
_DELIMITERS = re.compile(r"(?<!\\)\$|(?<!\\)\\[()\[\]]")
_EMPTY = re.compile(
    r"\\emptyset|\\\{\s*\\\}|(?:the )?(?:empty|null) set|(?:there (?:is|are) )?no (?:real |such |valid )?"
    r"(?:solutions?|roots?|values?)(?: exists?)?",
    re.IGNORECASE,
)
_REALS = re.compile(r"\\reals|(?:[a-z]\s*\\in\s*)\\reals")
_DOTS = r"\s*(?:\.{2,}|\\[lc]?dots[bc]?)"
_REPEATING = re.compile(
    r"(?P<whole>\d*)\.(?P<lead>\d*)(?:\\overline\s*\{?(?P<over>\d+)\}?|\\bar\s*\{?(?P<bar>\d+)\}?"
    rf"|\((?P<parens>\d+)\)|\\dot\s*\{{?(?P<first>\d)\}}?(?:(?P<middle>\d*)\\dot\s*\{{?(?P<last>\d)\}}?)?"
    rf"|(?P<dots>{_DOTS}))"
)
# in braces; or a number that no list has, such as 000
_CERTAIN_GROUPS = re.compile(r"(?<=(?<!\\)\{)\d{1,3}(?:,\d{3})+(?=\})|(?<![\d,])\d{1,3}(?:,0\d\d)+(?!\d)")
_GROUPS_AFTER_EQUALS = re.compile(r"(?<==)\d{1,3}(?:,\d{3})+$")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|cis)")
_DEGREES_IN = re.compile(r"(\d+(?:\.\d+)?)\s*°")
_CIS = re.compile(r"\\cis\s*(?:\((?P<inner>(?:[^()]|\([^()]*\))*)\)|\{(?P<braced>(?:[^{}]|\{[^{}]*\})*)\}"
                  r"|(?P<bare>\\frac\{[^{}]*\}\{[^{}]*\}|[^\s+()]+))")  # fmt: skip
_OPEN, _CLOSE = "({[", ")}]"
_TOKEN = re.compile(r"\\[{}]|\\[a-zA-Z]+|\\.|.", re.DOTALL)
_OPERATORS = {"<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", "=": "="}
_OPERATOR_FIRST = re.compile(r"[<>]|\\[lg]e(?![a-z])")
_SUBJECT = re.compile(rf"([a-zA-Z])\s*(?:{_OPERATOR_FIRST.pattern})")
_ENVIRONMENT = re.compile(r"\\begin\{([pbvB]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_BUILDER = re.compile(r"\s*(?P<name>[a-zA-Z])\s*(?:\\in\s*\\reals\s*)?(?:\\mid|\||:)(?P<condition>.*)", re.DOTALL)
_GREEK = r"\\(?:alpha|beta|gamma|delta|theta|phi|varphi|lambda|mu|sigma|omega|rho|tau)"
_NAME = re.compile(
    rf"(?:[a-zA-Z]|[A-Z]{{2,}}|[a-zA-Z]{{3,}}|{_GREEK})'?(?:_\{{?[\w, ]+\}}?)?\s*(?:\([^()=<>]*\))?"
    r"|\(\s*[a-zA-Z](?:,\s*[a-zA-Z])*\s*\)"
)
_FIGURE = re.compile(r"(?:m(?=\s*\\)|m?\\(?:angle|triangle|frac|overline|measuredangle)|[A-Z_0-9{}|:/\s])+")
_VARIABLE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]+")
_FUNCTION = re.compile(r"\A([a-zA-Z])\s*\([a-zA-Z]\)\Z")
_FUNCTION_OF_NUMBER = re.compile(r"[fghFGHP]\s*\(\s*-?[\d./]+\s*\)")
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
# commands that latex2sympy interprets; it takes others for symbols
_KNOWN_COMMANDS = (
    "frac dfrac tfrac sqrt cdot times div pi infty binom sum prod int lim to sin cos tan cot sec csc sinh cosh tanh "
    "arcsin arccos arctan log ln exp max min gcd lcm lfloor rfloor lceil rceil lvert rvert vert mid overline bar bmod "
    "begin end mathrm mathit prime alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda "
    "mu nu xi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega"
)
_COMMANDS = frozenset(_KNOWN_COMMANDS.split())
_SHORT_NAME = re.compile(r"[\w.-]{1,30}(?: [\w.-]{1,30}){0,2}", re.ASCII)
_PROSE = re.compile(
    r"(?<![\\a-zA-Z])(?:[a-zA-Z]{4,}|(?:is|the|to|of|at|in|by|for|not|yes|no|an|it|be|if|so|as|per|cm|km|mm|kg|ft)"
    r"(?![a-zA-Z]))|[^\x00-\x7f]|[?\"#&@~$`]|(?<=\d)\s+(?=\d)|!!|\d[eE][-+]?\d|'"
)


def _spell(text: str) -> str:
    """The text with one spelling for each sign, words for relations replaced, and repeating decimals as fractions."""
    text = _DELIMITERS.sub(" ", text.translate(_SIGNS))
    text = _CERTAIN_GROUPS.sub(lambda match: match[0].replace(",", ""), text)
    text = _GROUPS_AFTER_EQUALS.sub(_joined_groups, text)
    if text.count("{") > text.count("}"):  # an unclosed box
        text = text.removeprefix("\\boxed{")
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    if _TRIGONOMETRIC.search(text):
        text = _DEGREES_IN.sub(r"(\\frac{\1\\pi}{180})", text)
    text = _CIS.sub(lambda m: rf"e^{{i({m['inner'] or m['braced'] or m['bare']})}}", text)
    return _REPEATING.sub(_as_fraction, text).replace("°", "").strip()


def _joined_groups(match: re.Match[str]) -> str:
    groups = match[0].split(",")
    if len(groups[0]) == 3 and not any(group.startswith("0") for group in groups):
        raise Unreadable("a list or a number")
    return "".join(groups)


def _as_fraction(match: re.Match[str]) -> str:
    """A repeating decimal, of ``_REPEATING``, as a LaTeX fraction."""
    lead = match["lead"]
    if match["dots"] is not None:  # the digits must show the period: at least two repeats, three for a single digit
        found = re.fullmatch(r"(\d*?)(\d)\2{2,}|(\d*?)(\d{2,9}?)\4+", lead)
        if found is None:
            raise Unreadable("a decimal without a visible period")
        lead, period = (found[1], found[2]) if found[2] else (found[3], found[4])
    elif match["first"] is not None:
        period = match["first"] + (match["middle"] or "") + (match["last"] or "")
    else:
        period = match["over"] or match["bar"] or match["parens"]
    if len(lead) + len(period) > 200:
        raise Unreadable("a decimal without a visible period")
    whole = (match["whole"] or "0") + lead
    return rf"\frac{{{int(whole + period) - int(whole)}}}{{{10 ** len(lead) * (10 ** len(period) - 1)}}}"


def read(answer: str) -> Form:
    """The form of an answer, without its unit.

    Raises:
        Unreadable: it is not mathematical notation, or ambiguous.
    """
    text = _spell(normalise(answer))
    form = _read_marked(_WORDS.sub(lambda match: _MARKS[match[1].lower()], text))
    if isinstance(form, Literal):
        raise Unreadable("words")
    return form


def _pieces(text: str, separators: frozenset[str]) -> Iterator[tuple[str, str]]:
    """(separator before it, piece) at bracket depth 0; ``separators`` may include the marks for "and" and "or"."""
    depth, start, before = 0, 0, ""
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token[-1] in _OPEN and token not in ("\\(", "\\["):
            depth += 1
        elif token[-1] in _CLOSE and token not in ("\\)", "\\]"):
            depth -= 1
        elif depth == 0 and token in separators:
            yield before, text[start : match.start()].strip()
            before, start = token, match.end()
        elif depth < 0:
            raise Unreadable("a bracket closes that never opened")
    if depth != 0:
        raise Unreadable("a bracket stays open")
    yield before, text[start:].strip()


_WORDS = re.compile(r"(?:,\s*)?(?<![\\a-zA-Z])((?i:and|or))(?![a-z])")
# single characters in place of the words, so that they separate like signs
_MARKS = {"and": "\x01", "or": "\x02"}


def _read_marked(text: str) -> Form:
    text = text.strip()
    if not text:
        raise Unreadable("an empty part")
    if _EMPTY.fullmatch(text.replace("  ", " ")):
        return EMPTY
    if _REALS.fullmatch(text):
        return Reals()
    if match := re.fullmatch(rf"(?:{_NAME.pattern})\s*\\in(?![a-z])\s*(?P<set>.+)", text, re.DOTALL):
        return _read_marked(match["set"])
    for operator in (r"\cup", r"\setminus", r"\cap"):
        parts = [part for _, part in _pieces(text, frozenset((operator,)))]
        if len(parts) > 1:
            return Combined(operator, tuple(_read_marked(part) for part in parts))
    pieces = list(_pieces(text, frozenset((",", ";", *_MARKS.values(), r"\quad", r"\qquad"))))
    pieces = [(before, piece) for before, piece in pieces if piece]
    if len(pieces) == 1:
        return _read_one(pieces[0][1])
    if not pieces:
        raise Unreadable("an empty list")
    texts = [piece for _, piece in pieces]
    if (subject := _SUBJECT.match(texts[0])) is not None:  # x < -2 or > 1
        texts = [subject[1] + piece if _OPERATOR_FIRST.match(piece) else piece for piece in texts]
    return _joined([before for before, _ in pieces[1:]], [_read_one(piece) for piece in texts])


def _joined(separators: list[str], items: list[Form]) -> Form:
    """Several pieces between commas, "and" and "or" as one form."""
    regions = [isinstance(item, Relation | Combined) and not is_equation(item) for item in items]
    if all(regions):
        return Combined(r"\cup" if set(separators) == {_MARKS["or"]} else ",", tuple(items))
    if any(regions):
        raise Unreadable("inequalities and other things in one list")
    if any(isinstance(item, Assigned) for item in items):
        return _assigned(items)
    flat: list[Form] = []
    for item in items:
        flat.extend(item.items if isinstance(item, Many) and item.kind == "list" else [item])
    return Many("list", tuple(flat))


def is_equation(form: Form) -> bool:
    return isinstance(form, Relation) and set(form.operators) == {"="}


def _assigned(items: list[Form]) -> Form:
    """``x=2, 4``: a value without a name after an assignment is another value of the last name."""
    pairs: list[tuple[str, Form]] = []
    for item in items:
        if isinstance(item, Assigned):
            pairs.extend(item.pairs)
        elif not pairs or isinstance(item, Relation):
            raise Unreadable("a value before the first name")
        else:
            values = item.items if isinstance(item, Many) and item.kind == "list" else (item,)
            pairs.extend((pairs[-1][0], value) for value in values)
    return Assigned(tuple(pairs))


def _read_one(text: str) -> Form:
    """A piece without a separator at depth 0."""
    approximate = [piece for _, piece in _pieces(text, frozenset((r"\approx",)))]
    if len(approximate) > 1:  # the exact value; after a bare name, the approximate one
        return _read_one(approximate[1] if _NAME.fullmatch(approximate[0]) else approximate[0])
    sides = list(_pieces(text, frozenset(_OPERATORS)))
    if len(sides) > 1:
        return _related([side for _, side in sides], [_OPERATORS[sign] for sign, _ in sides[1:]])
    if (match := _ENVIRONMENT.fullmatch(text)) and "\\begin" not in match[2]:
        rows = [row for row in re.split(r"\\\\", match[2]) if row.strip()]
        return Cells(tuple(tuple(_read_one(cell.strip()) for cell in row.split("&")) for row in rows))
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return _braced(text[2:-2].strip())
    if text.startswith("{") and text.endswith("}") and len(list(_pieces(text[1:-1], frozenset(",")))) > 1:
        return _braced(text[1:-1].strip())
    if text[0] in "([" and text[-1] in ")]" and _encloses(text):
        items = [piece for _, piece in _pieces(text[1:-1], frozenset(",;"))]
        if len(items) > 1:
            return Many("tuple", tuple(_read_one(item) for item in items if item), text[0] + text[-1])
        return _read_one(text[1:-1].strip()) if text[1:-1].strip() else Scalar(_formula(text))
    ratio = [piece for _, piece in _pieces(text, frozenset(":"))]
    if len(ratio) > 1:
        return Ratio(tuple(Scalar(_formula(piece)) for piece in ratio))
    return _signs_apart(text)


def _encloses(text: str) -> bool:
    """Does the first bracket close with the last character: (1,2), not (1)(2)?"""
    depth = 0
    for match in _TOKEN.finditer(text):
        depth += (match[0][-1] in _OPEN) - (match[0][-1] in _CLOSE)
        if depth == 0:
            return match.end() == len(text)
    return False


def _braced(inner: str) -> Form:
    if not inner:
        return EMPTY
    if (match := _BUILDER.fullmatch(inner)) and any(sign in inner for sign in ("<", ">", r"\le", r"\ge", r"\ne")):
        return _read_marked(match["condition"])
    form = _read_marked(inner)
    if isinstance(form, Many) and form.kind == "list":
        return Many("set", form.items)
    if isinstance(form, Scalar | Literal | Many | Cells):
        return Many("set", (form,))
    raise Unreadable("braces around a condition")


def _signs_apart(text: str) -> Form:
    r"""``3 \pm 1`` is the list of 4 and 2. Several signs in one expression are ambiguous."""
    signs = re.findall(r"\\(?:pm|mp)(?![a-z])", text)
    if not signs:
        try:
            return Scalar(_formula(text))
        except Unreadable:
            if not _SHORT_NAME.fullmatch(text):
                raise
            return Literal(text.casefold())
    if len(signs) > 1:
        raise Unreadable("several signs of two values")
    head, tail = re.split(r"\\(?:pm|mp)(?![a-z])", text)
    return Many("list", tuple(Scalar(_formula(f"{head}{sign} {tail}")) for sign in "+-"))


def _formula(text: str) -> str:
    """Return the text if it is a formula.

    Raises:
        Unreadable: it contains words or unknown signs; one of its numbers must not count as the whole.
    """
    bare = re.sub(r"\\(?:begin|end)\{[a-z]+\}", "", text)
    bare = bare.replace("&", "") if bare != text else bare
    if re.search(r"\\(?:overline|bar)\s*\{[^{}]*[^A-Za-z{}]", text):
        raise Unreadable("a bar over an expression")
    if unknown := set(_COMMAND.findall(text)) - _COMMANDS:
        raise Unreadable(f"commands without a value: {sorted(unknown)}")
    if found := _PROSE.search(bare):
        raise Unreadable(f"not a formula: {found[0]!r}")
    if any(mark in text for mark in _MARKS.values()) or ("," in text and not re.search(r"[({]", text)):
        raise Unreadable("a list inside a formula")
    return text.strip()


def _related(sides: list[str], operators: list[str]) -> Form:
    """Sides and the signs between them: an assignment, an inequality, an equation; or the result of a computation."""
    if not all(sides):
        raise Unreadable("a relation with an empty side")
    if set(operators) != {"="}:
        # f(x) in a chain of inequalities is one unknown
        return Relation(tuple(_formula(_FUNCTION.sub(r"\1", side)) for side in sides), tuple(operators))
    left, right = sides[0], _read_one(sides[-1])
    if _NAME.fullmatch(left):
        name = left.split("(")[0].strip() if left[0] != "(" else re.sub(r"\s", "", left)
        values = right.items if isinstance(right, Many) and right.kind == "list" else (right,)
        return Assigned(tuple((name, value) for value in values))
    if _FIGURE.fullmatch(left) or not _VARIABLE.search(_FUNCTION_OF_NUMBER.sub("", re.sub(r"\\bmod", "", left))):
        return right
    if len(sides) > 2:
        raise Unreadable("a chain of equations")
    return Relation(tuple(_formula(side) for side in sides), ("=",))

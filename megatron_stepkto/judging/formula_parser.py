r"""Formulas in LaTeX or plain text as functions of their names: ``\frac{x^2}{3} + \sqrt{2}``.

A formula is split into tokens, parsed by recursive descent, and evaluated on numbers; text is never evaluated. Work
grows with the length of the formula alone: numbers, depth and length are bounded. Values are exact fractions as far as
the operations allow, else floating-point numbers.
"""

from __future__ import annotations

import cmath
import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import cast

Value = Fraction | float | complex
MAX_DEPTH = 30
MAX_TOKENS = 200  # of one side
MAX_BITS = 2000  # of an exact power
MAX_FACTORIAL = 60

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
_GREEK = frozenset((
    r"\alpha", r"\beta", r"\gamma", r"\delta", r"\epsilon", r"\varepsilon", r"\theta", r"\phi", r"\varphi",
    r"\lambda", r"\mu", r"\sigma", r"\omega", r"\rho", r"\tau", r"\zeta", r"\eta", r"\kappa", r"\nu", r"\xi", r"\psi",
    r"\Delta", r"\Gamma", r"\Theta", r"\Phi", r"\Omega", r"\ell",
))  # fmt: skip
_MARKED = frozenset((r"\overline", r"\bar", r"\hat", r"\widehat", r"\tilde", r"\overarc"))
_TRIGONOMETRIC: dict[str, Callable[[complex], complex]] = {
    r"\sin": cmath.sin, r"\cos": cmath.cos, r"\tan": cmath.tan,
    r"\cot": lambda x: 1 / cmath.tan(x), r"\sec": lambda x: 1 / cmath.cos(x), r"\csc": lambda x: 1 / cmath.sin(x),
}  # fmt: skip
_INVERSE: dict[str, Callable[[complex], complex]] = {
    r"\arcsin": cmath.asin, r"\arccos": cmath.acos, r"\arctan": cmath.atan,
}  # fmt: skip
_CALLED = frozenset("fgh")  # letters that are functions before a bracket
_NO_NAME = frozenset((*"+-*/^!%°()|", r"\frac", r"\sqrt", *_TRIGONOMETRIC, *_INVERSE, r"\log", r"\ln", r"\exp"))
_OPEN = {"(": ")", "[": "]", "{": "}"}


def size_of(value: Value) -> float:
    return cast(float, abs(value))


class Unreadable(Exception):
    """Not a formula that this module reads, or one without a value here."""


@dataclass(frozen=True)
class Token:
    text: str  # "\frac", "12", "x", "+"; "\text" with ``words``
    start: int
    words: str = ""
    number: bool = False


MAX_CALLS = 200  # of functions that the solution defined, to find one value
MAX_DIGITS = 300  # of a number: a float holds no larger one


@dataclass
class Scope:
    """The values of names, and how open notation is read; ``scale`` is the largest number met in between."""

    values: dict[str, Value] = field(default_factory=dict)
    seed: int | None = None  # names without a value get a random one; None: they have none
    mixed: bool = True  # 1\frac{1}{2} is 3/2, not 1/2
    by_rest: bool = False  # 1/2x is 1/(2x)
    percent: Fraction = Fraction(1, 100)
    scale: float = 1.0
    functions: dict[str, tuple[str, Compiled]] = field(default_factory=dict)
    depth: int = 0
    calls: list[int] = field(default_factory=lambda: [MAX_CALLS])  # that are left, of a formula and all it calls

    def note(self, value: Value) -> Value:
        if (size := size_of(value)) > self.scale:
            self.scale = float(size)
        return value

    def of_name(self, name: str) -> Value:
        if (value := self.values.get(name)) is not None:
            return value
        if self.seed is None:
            raise Unreadable(name)
        return self.random(name)

    def random(self, name: str) -> float:
        """A number that depends on the name and the seed alone: 1 to 3 with seed 0, 2.5 to 7.5 with seed 1, and so on.

        Of one size, they would all lie on one side of what a formula turns at: |x - 5| is 5 - x from 1 to 3.
        """
        return 2.5 ** (self.seed or 0) * (1 + zlib.crc32(f"{self.seed} {name}".encode()) / 2**31)


Compiled = Callable[[Scope], Value]


@dataclass(frozen=True)
class Formula:
    """One side of an equation."""

    text: str  # its tokens, one space between them
    value: Compiled
    names: frozenset[str]
    lone_name: bool
    lone_number: str  # "3.14"; "" where it is not a single number
    rich: bool  # holds a root, a power, a factorial, a binomial or a fraction of expressions
    open: bool  # in a notation that has other readings (units, degrees, names of functions)
    called: tuple[str, str] | None = None  # f(x): a function and its only argument, a name


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


class _Parser:
    def __init__(self, tokens: Sequence[Token], plain: bool) -> None:
        self.tokens, self.plain = tokens, plain
        self.position = self.depth = self.bars = self.degrees = 0
        self.names: set[str] = set()
        self.rich = self.open = False

    def peek(self, ahead: int = 0) -> str:
        place = self.position + ahead
        return self.tokens[place].text if place < len(self.tokens) else ""

    def take(self) -> Token:
        if self.position >= len(self.tokens):
            raise Unreadable("the end")
        self.position += 1
        return self.tokens[self.position - 1]

    def expect(self, text: str) -> None:
        if self.take().text != text:
            raise Unreadable(f"no {text}")

    def expression(self) -> Compiled:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        sign = self.take().text if self.peek() in ("+", "-") else "+"
        first = self.term()
        terms = [(sign, first)]
        while self.peek() in ("+", "-"):
            sign = self.take().text
            while self.peek() == "-":  # 3 - -2
                self.take()
                sign = "-" if sign == "+" else "+"
            terms.append((sign, self.term()))
        self.depth -= 1
        if len(terms) == 1:
            return first if terms[0][0] == "+" else lambda scope: -first(scope)

        def value(scope: Scope) -> Value:
            total: Value = Fraction(0)
            for sign, term in terms:
                part = scope.note(term(scope))
                total = total + part if sign == "+" else total - part
            return total

        return value

    def term(self) -> Compiled:
        value = self.factor()
        while True:
            sign = self.peek()
            if sign == "*" or (sign == "/" and self.peek(1)):
                self.take()
                negative = self.peek() == "-"
                if negative:
                    self.take()
                following = self.factor()
                if negative:
                    following = _negative(following)
                value = _product(value, following) if sign == "*" else self.quotient(value, following)
            elif self.begins_factor():
                value = _product(value, self.factor())
            else:
                return value

    def quotient(self, top: Compiled, bottom: Compiled) -> Compiled:
        """``a / b``, with the factors that follow ``b`` without a sign: 1/2x."""
        rest = []
        while self.begins_factor():
            rest.append(self.factor())
        if not rest:
            return lambda scope: _divided(top(scope), bottom(scope))
        self.open = True
        product = rest[0]
        for following in rest[1:]:
            product = _product(product, following)
        return lambda scope: (
            _divided(top(scope), bottom(scope) * product(scope))
            if scope.by_rest
            else _divided(top(scope), bottom(scope)) * product(scope)
        )

    def begins_factor(self) -> bool:
        """Does a factor follow without a sign between?"""
        text = self.peek()
        if not text or (text == "|" and self.bars) or text in ")]}+-*/^_!%,=<>'°":
            return False
        if self.tokens[self.position].number:
            if self.tokens[self.position - 1].text in (")", "]"):
                return True
            raise Unreadable("two numbers without a sign")
        return text not in (r"\choose", r"\rfloor", r"\rceil")

    def factor(self) -> Compiled:
        value = self.base()
        while self.peek() in ("^", "!", "%", "°", r"\text"):
            value = self.raised(value)
        return value

    def raised(self, value: Compiled) -> Compiled:
        """A base with what follows it: a power, a factorial, a percent sign, degrees, a unit."""
        mark = self.take()
        if mark.text == "!":
            self.rich = True
            if self.peek() == "!":
                raise Unreadable("a double factorial")
            return lambda scope: _factorial(value(scope))
        if mark.text == "%":
            self.open = True
            return lambda scope: value(scope) * scope.percent
        if mark.text == "°":
            self.degrees += 1
            self.open = True
            return value
        if mark.text == r"\text":
            self.open = True
            if self.peek() == "^":  # cm^2
                self.take()
                self.group()
            return value
        if self.peek() == r"\circ" or [self.peek(n) for n in range(3)] == ["{", r"\circ", "}"]:
            self.position += 1 if self.peek() == r"\circ" else 3
            self.degrees += 1
            self.open = True
            return value
        self.rich = True
        power = self.exponent()
        if self.peek() == "^":
            raise Unreadable("a power of a power")
        return lambda scope: _power(value(scope), power(scope), scope)

    def exponent(self) -> Compiled:
        if self.peek() in ("-", "+") and self.plain:
            negative = self.take().text == "-"
            power = self.base()
            return _negative(power) if negative else power
        token = self.tokens[self.position] if self.peek() else None
        if token and token.number and len(token.text) > 1 and not self.plain:
            raise Unreadable("x^10 is x^1 0")
        return self.base()

    def group(self) -> Compiled:
        """An argument of a command: braces, or a single token, of a number its first digit."""
        if self.peek() == "{":
            return self.bracketed()
        token = self.take()
        if token.number:
            if len(token.text) > 1:  # \\frac12
                if self.plain or not token.text.isdigit():
                    raise Unreadable("digits without braces")
                rest = Token(token.text[1:], token.start + 1, number=True)
                self.position -= 1
                self.tokens = [*self.tokens[: self.position], rest, *self.tokens[self.position + 1 :]]
            return _constant(Fraction(token.text[0]))
        self.position -= 1
        return self.base()

    def bracketed(self) -> Compiled:
        opening = self.take().text
        bars, self.bars = self.bars, 0
        value = self.expression()
        if opening == "{" and self.peek() == r"\choose":
            self.take()
            self.rich = True
            top, bottom = value, self.expression()
            value = _binomial_of(top, bottom)
        self.bars = bars
        self.expect(_OPEN[opening])
        if opening == "[":
            self.open = True
        return value

    def base(self) -> Compiled:
        token = self.take()
        text = token.text
        if token.number:
            return self.number(token)
        if text == r"\text":
            self.open = True
            return self.name(f"text {token.words}")
        if text in ("(", "{", "["):
            if text == "[" and (area := self.area()):
                return self.name(area)
            self.position -= 1
            return self.bracketed()
        if text == "|":
            self.bars += 1
            value = self.expression()
            self.bars -= 1
            self.expect("|")
            self.open = True
            return lambda scope: Fraction(abs(v)) if isinstance(v := value(scope), Fraction) else abs(v)
        if text.isalpha() or text in _GREEK:
            return self.letters(text)
        if text in _MARKED:
            self.open = True
            start = self.position
            names = set(self.names)
            self.group()
            self.names = names
            inner = [inside.text for inside in self.tokens[start : self.position]]
            if any(inside[0].isdigit() for inside in inner):
                raise Unreadable("a repeating decimal")
            return self.name(f"{text} {''.join(inner)}")
        return self.command(text)

    def area(self) -> str:
        """The name of "[ABC]", an area; "" where it is something else."""
        length = 0
        while self.peek(length).isalpha() and self.peek(length).isupper():
            length += 1
        if length < 3 or self.peek(length) != "]":
            return ""
        name = "area " + "".join(self.peek(n) for n in range(length))
        self.position += length + 1
        return name

    def number(self, token: Token) -> Compiled:
        if len(token.text) > MAX_DIGITS:
            raise Unreadable("digits")
        number = Fraction(token.text)
        if self.peek() == "_":
            raise Unreadable("a numeral in a base")
        if self.peek() == r"\frac" and number.denominator == 1:
            start = self.position
            following = self.factor()
            if any(token.text == "^" for token in self.tokens[start : self.position]):
                raise Unreadable("a power of a mixed number")
            names = {
                text for _, text in enumerate(t.text for t in self.tokens[start : self.position]) if text.isalpha()
            }
            if names or self.tokens[self.position - 1].text != "}":
                return lambda scope: number * following(scope)
            self.open = True
            return lambda scope: number + following(scope) if scope.mixed else number * following(scope)
        return _constant(number)

    def name(self, name: str) -> Compiled:
        self.names.add(name)
        return lambda scope: scope.of_name(name)

    def letters(self, first: str) -> Compiled:
        """A name: a letter with its index and primes, points such as AB, or a function with its argument."""
        name = first
        if first.isupper():
            while self.peek().isalpha() and self.peek().isupper():
                name += self.take().text
            if len(name) == 2:
                name = "".join(sorted(name))  # the segments AB and BA
        if self.peek() == "_":
            self.take()
            name += "_" + self.index()
        while self.peek() == "'":
            self.take()
            name += "'"
        if self.peek() == "^" and first in _CALLED:
            start = self.position
            self.take()
            self.exponent()
            if self.peek() == "(":
                name += "".join(t.text for t in self.tokens[start : self.position])
                return self.call(name)
            self.position = start
        if self.peek() == "(" and (first in _CALLED or name != first or self.called()):
            return self.call(name)
        return self.name(name)

    def called(self) -> bool:
        """Is "P(x)" a value of a function: an upper-case letter with a single argument, a name or a number?"""
        return self.tokens[self.position - 1].text.isupper() and self.peek(2) == ")"

    def call(self, name: str) -> Compiled:
        self.open = True
        argument = self.bracketed()
        self.names.add(f"{name}()")

        def value(scope: Scope) -> Value:
            at = argument(scope)
            if name in scope.functions and scope.depth < 5:
                scope.calls[0] -= 1
                if scope.calls[0] < 0:
                    raise Unreadable("calls")
                parameter, body = scope.functions[name]
                inner = Scope(
                    {**scope.values, parameter: at}, scope.seed, functions=scope.functions, depth=scope.depth + 1,
                    calls=scope.calls,
                )  # fmt: skip
                found = body(inner)
                scope.note(inner.scale)
                return found
            if scope.seed is None:
                raise Unreadable(name)
            return scope.random(f"{name}({complex(at):.9g})")

        return value

    def index(self) -> str:
        if self.peek() != "{":
            return self.take().text
        start = self.position
        depth = 0
        while True:
            text = self.take().text
            depth += (text == "{") - (text == "}")
            if not depth:
                return "".join(token.text + token.words for token in self.tokens[start + 1 : self.position - 1])

    def command(self, text: str) -> Compiled:
        if text == r"\pi":
            self.rich = True
            return lambda scope: math.pi
        if text == r"\frac":
            start = self.position
            top, bottom = self.group(), self.group()
            self.rich = self.rich or self.position - start > 6
            return lambda scope: _divided(top(scope), bottom(scope))
        if text == r"\sqrt":
            self.rich = True
            degree: Compiled = _constant(Fraction(2))
            if self.peek() == "[":
                degree = self.bracketed()
            value = self.group()
            return lambda scope: _root(value(scope), degree(scope))
        if text == r"\binom":
            self.rich = True
            return _binomial_of(self.group(), self.group())
        if text in _TRIGONOMETRIC or text in _INVERSE or text in (r"\ln", r"\log", r"\exp"):
            return self.function(text)
        if text in (r"\lfloor", r"\lceil"):
            self.open = True
            value = self.expression()
            self.expect(text.replace("l", "r", 1))
            rounded = math.floor if text == r"\lfloor" else math.ceil

            def whole(scope: Scope) -> Value:
                found = value(scope)
                if isinstance(found, complex):
                    raise Unreadable("no order")
                return Fraction(rounded(found))

            return whole
        if text == r"\gcd" or text == r"\lcm":
            raise Unreadable("a list of arguments")
        if text in (r"\angle", r"\triangle"):
            self.open = True
            name = text
            while self.peek().isalpha():
                name += self.take().text
            return self.name(name)
        raise Unreadable(text)

    def function(self, text: str) -> Compiled:
        self.open = self.rich = True
        log_base: Compiled | None = None
        if text == r"\log" and self.peek() == "_":
            self.take()
            log_base = self.group()
        power: Compiled | None = None
        if self.peek() == "^":
            self.take()
            if self.peek() == "{" and self.peek(1) == "-":
                raise Unreadable("an inverse function")
            power = self.group()
        degrees, self.degrees = self.degrees, 0
        argument = self.argument()
        in_degrees = self.degrees > 0
        self.degrees = degrees

        def value(scope: Scope) -> Value:
            at = argument(scope)
            found: Value
            if text in _TRIGONOMETRIC:
                found = _real(_TRIGONOMETRIC[text](complex(at) * (math.pi / 180 if in_degrees else 1)))
            elif text in _INVERSE:
                found = _real(_INVERSE[text](complex(at)))
            elif text == r"\exp":
                found = _real(cmath.exp(complex(at)))
            else:
                if not at:
                    raise Unreadable("log of 0")
                found = _real(cmath.log(complex(at)))
                if text == r"\log":
                    found = _divided(found, _real(cmath.log(complex(log_base(scope)))) if log_base else math.log(10))
            return _power(found, power(scope), scope) if power else found

        return value

    def argument(self) -> Compiled:
        """Of a function: brackets, or factors up to the next sign or function (\\sin 2x \\cos y)."""
        if self.peek() == "(":
            return self.factor()
        if self.peek() == "-":
            self.take()
            return _negative(self.argument())
        value = self.factor()
        while True:
            if self.peek() == "/" and self.plain:
                self.take()
                value = self.quotient(value, self.factor())
            text = self.peek()
            if text in _TRIGONOMETRIC or text in _INVERSE or text in (r"\ln", r"\log", "(") or not self.begins_factor():
                return value
            value = _product(value, self.factor())


def _constant(number: Fraction) -> Compiled:
    return lambda scope: number


def _negative(value: Compiled) -> Compiled:
    return lambda scope: -value(scope)


def _product(left: Compiled, right: Compiled) -> Compiled:
    return lambda scope: scope.note(left(scope) * right(scope))


def _divided(top: Value, bottom: Value) -> Value:
    if size_of(bottom) < 1e-300:
        raise Unreadable("a division by zero")
    return top / bottom


def _real(value: complex) -> Value:
    """Without an imaginary part that is rounding."""
    return value.real if abs(value.imag) <= 1e-13 * max(1.0, abs(value)) else value


def _power(base: Value, exponent: Value, scope: Scope) -> Value:
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        power = int(exponent)
        if not base and power <= 0:
            raise Unreadable("a power of 0")
        if isinstance(base, Fraction):
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if bits * abs(power) <= MAX_BITS:
                return scope.note(base**power)
    elif not isinstance(base, complex) and base < 0:
        raise Unreadable("a broken power of a negative number")
    if not base:
        return Fraction(0)
    size = abs(math.log(size_of(base))) * size_of(exponent)
    if size > 600:
        raise Unreadable("too large")
    if isinstance(base, complex) or isinstance(exponent, complex):
        return scope.note(_real(complex(base) ** complex(exponent)))
    return scope.note(float(base) ** float(exponent))


def _root(value: Value, degree: Value) -> Value:
    if not isinstance(degree, Fraction) or degree.denominator != 1 or not 2 <= degree <= 100:
        raise Unreadable("a root of an open degree")
    if isinstance(value, Fraction):
        if value < 0 and degree % 2:
            return -_root(-value, degree)
        if value >= 0:
            parts = [_exact_root(part, int(degree)) for part in (value.numerator, value.denominator)]
            if parts[0] is not None and parts[1] is not None:
                return Fraction(parts[0], parts[1])
    if isinstance(value, complex) or value < 0:
        if degree != 2:
            raise Unreadable("a root of a complex number")
        return _real(cmath.sqrt(complex(value)))
    return float(value) ** (1 / int(degree))


def _exact_root(value: int, degree: int) -> int | None:
    if value.bit_length() > MAX_BITS:
        return None
    if degree == 2:
        root = math.isqrt(value)
    else:
        if value.bit_length() > 900:
            return None
        root = round(value ** (1 / degree))
    return root if root**degree == value else None


def _factorial(value: Value) -> Value:
    if isinstance(value, complex) or not 0 <= value <= MAX_FACTORIAL:
        raise Unreadable("a factorial")
    if isinstance(value, Fraction):
        if value.denominator != 1:
            raise Unreadable("a factorial")
        return Fraction(math.factorial(int(value)))
    return math.gamma(value + 1)


def _binomial_of(top: Compiled, bottom: Compiled) -> Compiled:
    def value(scope: Scope) -> Value:
        n, k = top(scope), bottom(scope)
        if isinstance(n, complex) or isinstance(k, complex) or not (0 <= n <= 1000 and 0 <= k <= 1000):
            raise Unreadable("a binomial")
        if isinstance(n, Fraction) and isinstance(k, Fraction):
            if n.denominator != 1 or k.denominator != 1:
                raise Unreadable("a binomial")
            return Fraction(math.comb(int(n), int(k)))
        try:
            return math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1))
        except ValueError:
            raise Unreadable("a binomial") from None

    return value


def parse(tokens: Sequence[Token], plain: bool) -> Formula:
    """One side of an equation. ``plain``: not in LaTeX, where 2^10 is 2^1 0.

    Raises:
        Unreadable: it is none that this module reads.
    """
    if not tokens or len(tokens) > MAX_TOKENS:
        raise Unreadable("length")
    parser = _Parser(tokens, plain)
    value = parser.expression()
    if parser.position != len(parser.tokens):
        raise Unreadable("more than an expression")
    texts = [token.text + token.words for token in tokens]
    unsigned = tokens[1:] if texts[0] == "-" else tokens
    while len(unsigned) > 2 and unsigned[0].text == "{" and unsigned[-1].text == "}":
        unsigned = unsigned[1:-1]
    numbers = [token for token in unsigned if token.text not in ("%", r"\text", "°")]
    lone_number = numbers[0].text if len(numbers) == 1 and numbers[0].number else ""
    lone_name = len(parser.names) == 1 and len(unsigned) == len(tokens)
    lone_name = lone_name and not any(text in _NO_NAME or text[:1].isdigit() for text in texts)
    called = None
    if len(texts) == 4 and texts[1::2] == ["(", ")"] and texts[2].isalpha() and f"{texts[0]}()" in parser.names:
        called = texts[0], texts[2]
    return Formula(
        " ".join(texts), value, frozenset(parser.names), lone_name, lone_number, parser.rich, parser.open, called
    )

r"""Formulas in LaTeX or plain text as functions of their names: ``\frac{x^2}{3} + \sqrt{2}``.

A formula is split into tokens (formula_tokens.py), parsed by recursive descent, and evaluated on numbers
(formula_values.py); text is never evaluated. Work grows with the length of the formula alone: numbers, depth and length
are bounded.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_stepkto.judging.formula_tokens import Token
from megatron_stepkto.judging.formula_values import (
    Compiled,
    Scope,
    Unreadable,
    Value,
    binomial,
    constant,
    divided,
    factorial_of,
    multiplied,
    negated,
    real,
    root_of,
    to_power,
)

MAX_DEPTH = 30
MAX_TOKENS = 200  # of one side
MAX_DIGITS = 300  # of a number: a float holds no larger one

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
                    following = negated(following)
                value = multiplied(value, following) if sign == "*" else self.quotient(value, following)
            elif self.begins_factor():
                value = multiplied(value, self.factor())
            else:
                return value

    def quotient(self, top: Compiled, bottom: Compiled) -> Compiled:
        """``a / b``, with the factors that follow ``b`` without a sign: 1/2x."""
        rest = []
        while self.begins_factor():
            rest.append(self.factor())
        if not rest:
            return lambda scope: divided(top(scope), bottom(scope))
        self.open = True
        product = rest[0]
        for following in rest[1:]:
            product = multiplied(product, following)
        return lambda scope: (
            divided(top(scope), bottom(scope) * product(scope))
            if scope.by_rest
            else divided(top(scope), bottom(scope)) * product(scope)
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
            return lambda scope: factorial_of(value(scope))
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
        return lambda scope: to_power(value(scope), power(scope), scope)

    def exponent(self) -> Compiled:
        if self.peek() in ("-", "+") and self.plain:
            negative = self.take().text == "-"
            power = self.base()
            return negated(power) if negative else power
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
            return constant(Fraction(token.text[0]))
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
            value = binomial(top, bottom)
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
        return constant(number)

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
            return lambda scope: divided(top(scope), bottom(scope))
        if text == r"\sqrt":
            self.rich = True
            degree: Compiled = constant(Fraction(2))
            if self.peek() == "[":
                degree = self.bracketed()
            value = self.group()
            return lambda scope: root_of(value(scope), degree(scope))
        if text == r"\binom":
            self.rich = True
            return binomial(self.group(), self.group())
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
                found = real(_TRIGONOMETRIC[text](complex(at) * (math.pi / 180 if in_degrees else 1)))
            elif text in _INVERSE:
                found = real(_INVERSE[text](complex(at)))
            elif text == r"\exp":
                found = real(cmath.exp(complex(at)))
            else:
                if not at:
                    raise Unreadable("log of 0")
                found = real(cmath.log(complex(at)))
                if text == r"\log":
                    found = divided(found, real(cmath.log(complex(log_base(scope)))) if log_base else math.log(10))
            return to_power(found, power(scope), scope) if power else found

        return value

    def argument(self) -> Compiled:
        """Of a function: brackets, or factors up to the next sign or function (\\sin 2x \\cos y)."""
        if self.peek() == "(":
            return self.factor()
        if self.peek() == "-":
            self.take()
            return negated(self.argument())
        value = self.factor()
        while True:
            if self.peek() == "/" and self.plain:
                self.take()
                value = self.quotient(value, self.factor())
            text = self.peek()
            if text in _TRIGONOMETRIC or text in _INVERSE or text in (r"\ln", r"\log", "(") or not self.begins_factor():
                return value
            value = multiplied(value, self.factor())


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

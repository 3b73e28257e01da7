"""Values of formulas: numbers, the scope that names get theirs from, and operations with bounds.

Values are exact fractions as far as the operations allow, else floating-point numbers.
"""

from __future__ import annotations

import cmath
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import cast

Value = Fraction | float | complex
MAX_BITS = 2000  # of an exact power
MAX_FACTORIAL = 60
MAX_CALLS = 200  # of functions that the solution defined, to find one value


def size_of(value: Value) -> float:
    return cast(float, abs(value))


class Unreadable(Exception):
    """Not a formula that this module reads, or one without a value here."""


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


def constant(number: Fraction) -> Compiled:
    return lambda scope: number


def negated(value: Compiled) -> Compiled:
    return lambda scope: -value(scope)


def multiplied(left: Compiled, right: Compiled) -> Compiled:
    return lambda scope: scope.note(left(scope) * right(scope))


def divided(top: Value, bottom: Value) -> Value:
    if size_of(bottom) < 1e-300:
        raise Unreadable("a division by zero")
    return top / bottom


def real(value: complex) -> Value:
    """Without an imaginary part that is rounding."""
    return value.real if abs(value.imag) <= 1e-13 * max(1.0, abs(value)) else value


def to_power(base: Value, exponent: Value, scope: Scope) -> Value:
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
        return scope.note(real(complex(base) ** complex(exponent)))
    return scope.note(float(base) ** float(exponent))


def root_of(value: Value, degree: Value) -> Value:
    if not isinstance(degree, Fraction) or degree.denominator != 1 or not 2 <= degree <= 100:
        raise Unreadable("a root of an open degree")
    if isinstance(value, Fraction):
        if value < 0 and degree % 2:
            return -root_of(-value, degree)
        if value >= 0:
            parts = [_exact_root(part, int(degree)) for part in (value.numerator, value.denominator)]
            if parts[0] is not None and parts[1] is not None:
                return Fraction(parts[0], parts[1])
    if isinstance(value, complex) or value < 0:
        if degree != 2:
            raise Unreadable("a root of a complex number")
        return real(cmath.sqrt(complex(value)))
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


def factorial_of(value: Value) -> Value:
    if isinstance(value, complex) or not 0 <= value <= MAX_FACTORIAL:
        raise Unreadable("a factorial")
    if isinstance(value, Fraction):
        if value.denominator != 1:
            raise Unreadable("a factorial")
        return Fraction(math.factorial(int(value)))
    return math.gamma(value + 1)


def binomial(top: Compiled, bottom: Compiled) -> Compiled:
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

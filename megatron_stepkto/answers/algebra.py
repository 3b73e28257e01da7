r"""Are two expressions equal? Exactly: proven, refuted, or left open. Runs inside the limits of math_verify_worker.

Rationals are compared as such. Any other number is evaluated with sympy's accuracy tracking: a difference whose
leading bits are certain is not zero. A difference that vanishes is zero where sympy proves it, or where it vanishes to
many more digits than a nonzero expression of its size would. Expressions with unknowns are expanded, or compared at
points.
"""

from __future__ import annotations

import itertools
import re
from functools import lru_cache

import sympy  # type: ignore[import-untyped]
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy, normalize_latex
from sympy.core.evalf import evalf  # type: ignore[import-untyped]
from sympy.core.function import AppliedUndef  # type: ignore[import-untyped]

from megatron_stepkto.answers.reading import Unreadable

FIRST_BITS = 128
CERTAIN_BITS = 20  # of the leading digits of a nonzero difference
MAX_BITS = 50_000
MIN_DECIMALS = 6  # a decimal with fewer is not accepted as a rounding of an exact value
MAX_RENAMED = 3
DOUBLE_DECIMALS = 15  # with this many it may be a printed double, whose last digits are rounding error
_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)
_CONVERSION = ConversionConfig()
# latex2sympy reads 2(3) as the mixed number 5
_JUXTAPOSED = re.compile(r"(?<=[\d)])(?<![\^_]\d)\s*(?=\()|(?<=\))\s*(?=\d)")
_UPRIGHT = re.compile(r"\\(?:mathrm|mathit|operatorname)\s*\{\s*([a-zA-Z])\s*\}")
_DECIMAL = re.compile(r"-?\d*\.(\d*)")
_SEVERAL_READINGS = re.compile(r"/\s*\d+\s*[a-zA-Z(\\]|\\log(?!\s*_)|\^\s*-1")
# where functions are compared; several unknowns get different values
_WHOLE_POINTS = ((3, 7, 12, 19), (8, 5, 23, 4))
_POSITIVE_STARTS = (sympy.Integer(7), sympy.Integer(11))
_NEGATIVE_STARTS = (sympy.Integer(-5), sympy.Integer(-8))


@lru_cache(maxsize=256)
def expression(text: str) -> sympy.Basic:
    """The sympy object of one LaTeX expression, not evaluated: decimals exact, ``i`` the imaginary unit.

    Raises:
        Unreadable: latex2sympy cannot read it.
    """
    found = _parsed(text)
    if not isinstance(found, sympy.Expr):
        raise Unreadable(f"not a scalar: {type(found).__name__}")
    return _exact(found)


def matrix(text: str) -> list[list[sympy.Expr]]:
    """The evaluated cells of a computation with matrices.

    Raises:
        Unreadable: it is not a matrix.
    """
    found = _parsed(text)
    try:
        return [[_exact(cell) for cell in row] for row in found.doit().tolist()]
    except (AttributeError, ValueError, TypeError) as error:
        raise Unreadable("not a matrix") from error


def _parsed(text: str) -> sympy.Basic:
    text = _JUXTAPOSED.sub(r"\\cdot ", _UPRIGHT.sub(r"\1", text))
    text = re.sub(r"(\d+)\s*\\bmod\s*(\d+)", r"(\1-\2\\cdot\\lfloor\\frac{\1}{\2}\\rfloor)", text)
    try:
        return latex2sympy(
            normalize_latex(text, _NORMALIZATION), normalization_config=None, conversion_config=_CONVERSION
        )
    except MemoryError:
        raise
    except Exception as error:  # its grammar may raise anything
        raise Unreadable(f"latex2sympy: {type(error).__name__}") from error


def _exact(found: sympy.Expr) -> sympy.Expr:
    exact = {number: sympy.Rational(sympy.sstr(number, full_prec=True)) for number in found.atoms(sympy.Float)}
    units = {symbol: sympy.I for symbol in found.free_symbols if symbol.name == "i"}
    return found.xreplace({**exact, **units})


def equal(gold: str, answer: str) -> bool | None:
    """Are two LaTeX expressions equal? None: undecided.

    Raises:
        Unreadable: one of them cannot be read.
    """
    a, b = expression(gold), expression(answer)
    verdict = equal_expressions(a, b)
    if verdict is False:
        if _is_rounding(a, b, gold, answer):
            return True
        if _is_renamed(a, b) or _SEVERAL_READINGS.search(gold) or _SEVERAL_READINGS.search(answer):
            return None
    return verdict


def equal_expressions(a: sympy.Expr, b: sympy.Expr) -> bool | None:
    if a == b:
        return None if a.has(sympy.nan, sympy.zoo) else True
    a, b = _real_roots(a.doit()), _real_roots(b.doit())
    if any(side.has(sympy.nan, sympy.zoo) for side in (a, b)):
        return None
    if any(side.has(sympy.oo, -sympy.oo) for side in (a, b)):
        return bool(a == b) or (False if a in _INFINITIES or b in _INFINITIES else None)
    if a.has(AppliedUndef) or b.has(AppliedUndef):
        return True if sympy.expand(a - b) == 0 else None
    if a.free_symbols or b.free_symbols:
        return _equal_functions(a, b)
    return _is_zero(a - b)


def _real_roots(value: sympy.Expr) -> sympy.Expr:
    """Odd roots of negative numbers as taught in school, -2 for the cube root of -8; sympy takes the principal root."""
    if value.has(sympy.I):
        return value
    return value.replace(
        lambda part: (
            part.is_Pow and part.exp.is_Rational and part.exp.q > 1 and part.exp.q % 2 and sign(part.base) == -1
        ),
        lambda part: (-1) ** part.exp.p * (-part.base) ** part.exp,
    )


_INFINITIES = (sympy.oo, -sympy.oo)


def _is_renamed(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Do only the names of the unknowns differ: pi/4 + k pi and pi/4 + n pi?"""
    ours, theirs = (sorted(side.free_symbols - other.free_symbols, key=str) for side, other in ((a, b), (b, a)))
    if not ours or len(ours) != len(theirs) or len(ours) > MAX_RENAMED:
        return False
    return any(
        equal_expressions(a, b.xreplace(dict(zip(order, ours, strict=True)))) is not False
        for order in itertools.permutations(theirs)
    )


def sign(number: sympy.Expr) -> int | None:
    """-1, 0 or 1 of a real number; None where it is undecided."""
    number = number.doit()
    if number in _INFINITIES:
        return 1 if number == sympy.oo else -1
    if number.free_symbols or number.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo):
        return None
    zero = _is_zero(number)
    if zero is not False:
        return 0 if zero else None
    value = number.evalf(15)
    return None if not value.is_real else 1 if value > 0 else -1


def _is_zero(number: sympy.Expr) -> bool | None:
    """Is a constant zero? The evaluation is repeated with more bits until its leading ones are certain."""
    number = number if number.is_Rational else sympy.expand(number)
    if number.is_Rational:
        return bool(number == 0)
    enough = _enough_bits(number)
    bits, most = FIRST_BITS, min(enough, MAX_BITS)
    while (differs := _is_certainly_not_zero(number, bits)) is False and bits < most:
        bits = min(8 * bits, most)
    if differs is not False:
        return False if differs else None
    return True if enough <= MAX_BITS or sympy.simplify(number) == 0 else None


def _is_certainly_not_zero(number: sympy.Expr, bits: int) -> bool | None:
    """None: the expression has no value."""
    try:
        value = evalf(number, CERTAIN_BITS, {"maxprec": bits})
    except (NotImplementedError, ValueError, ArithmeticError):
        return None
    if value is sympy.S.ComplexInfinity:
        return None
    real, imaginary, real_bits, imaginary_bits = value
    return any(part is not None and certain is not None and certain >= CERTAIN_BITS // 2
               for part, certain in ((real, real_bits), (imaginary, imaginary_bits)))  # fmt: skip


def _enough_bits(number: sympy.Expr) -> int:
    """Bits to which a difference of this size must vanish to count as zero: 1,000, and 20 for each bit of a number or
    of the magnitude of a sub-expression in it.

    Explicit tiny parts such as 10^{-2000} raise this number above their own size. What remains possible is a
    coincidence of hundreds of digits between short expressions; none is known.
    """
    total = 0
    for part in sympy.preorder_traversal(number):
        if part.is_Integer:
            total += int(abs(part)).bit_length()
        elif part.is_Rational:
            total += int(abs(part.p)).bit_length() + int(part.q).bit_length()
        elif isinstance(part, sympy.Expr) and not part.free_symbols:
            try:
                real, imaginary, *_ = evalf(part, 10, {"maxprec": FIRST_BITS})
            except (NotImplementedError, ValueError, ArithmeticError, TypeError):
                return MAX_BITS + 1
            total += max((abs(p[2] + p[3]) for p in (real, imaginary) if p), default=0)
    return 1000 + 20 * total


def _equal_functions(a: sympy.Expr, b: sympy.Expr) -> bool | None:
    """Equal as functions of their unknowns? A difference at whole-number points refutes it; to be equal, they must
    agree there, at other positive points and, where both have a value, at negative ones."""
    difference = sympy.expand(a - b)
    if difference.has(sympy.factorial, sympy.binomial, sympy.gamma):
        difference = sympy.combsimp(difference)
    if not difference.free_symbols:
        return _is_zero(difference)
    symbols = sorted(difference.free_symbols, key=str)
    if difference.is_polynomial(*symbols):
        coefficients = sympy.Poly(difference, *symbols).coeffs()
        zeros = [_is_zero(c) if not c.free_symbols else None for c in coefficients]
        return False if False in zeros else None if None in zeros else True
    whole = [_is_zero_at(difference, dict(zip(symbols, itertools.cycle(point)))) for point in _WHOLE_POINTS]
    if False in whole:
        return False
    positive, negative = (
        [_is_zero_at(difference, {s: start / (3 + 2 * n) for n, s in enumerate(symbols)}) for start in starts]
        for starts in (_POSITIVE_STARTS, _NEGATIVE_STARTS)
    )
    return True if all((*whole, *positive)) and False not in negative else None


def _is_zero_at(difference: sympy.Expr, point: dict[sympy.Symbol, int | sympy.Rational]) -> bool | None:
    there = difference.subs(point).doit()
    return None if there.has(sympy.nan, sympy.zoo, sympy.oo) or there.free_symbols else _is_zero(there)


def _is_rounding(a: sympy.Expr, b: sympy.Expr, gold: str, answer: str) -> bool:
    """Is one a decimal of six places or more, and the other the exact value that it rounds?"""
    for text, decimal, other_text, other in ((gold, a, answer, b), (answer, b, gold, a)):
        match = _DECIMAL.fullmatch(text.replace(" ", ""))
        if not match or _DECIMAL.fullmatch(other_text.replace(" ", "")) or other.free_symbols or other.is_Integer:
            continue
        places = len(match[1].rstrip("0"))
        if places >= MIN_DECIMALS:
            allowed = sympy.Rational(1, 2 * 10**places)
            if places >= DOUBLE_DECIMALS:  # as a program prints it
                allowed = sympy.Max(allowed, sympy.Abs(decimal) * sympy.Rational(1, 2**51))
            above = sign(sympy.Abs(other - decimal) - allowed)
            return above is not None and above <= 0
    return False

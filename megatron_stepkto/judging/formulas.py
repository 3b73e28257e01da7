r"""Equations of formulas in a solution: powers, roots, factorials, rounded values, unknowns, each on both sides.

An equation is right where both sides have one value (``\sqrt{50} = 5\sqrt{2}``), for all values of its unknowns
(``(x+1)^2 = x^2+2x+1``), for those that the solution gave them (``x = 3`` two lines before), or where it follows from
the equations before it (``2x + 3 = 7``, ``2x = 4``, ``x = 2``). Such tests are numeric, at several points: two formulas
that agree there agree. What is none of these is an assumption, or unknown: no verdict. "Wrong" is said of values alone.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from megatron_stepkto.judging.equation_context import Subject, asserted, noun_after, understood_after, understood_before
from megatron_stepkto.judging.equation_readings import StepWords, in_other_units
from megatron_stepkto.judging.equations import MAX_CONTEXT, plain_text
from megatron_stepkto.judging.formula_chains import EQUALS, Chain, chains
from megatron_stepkto.judging.formula_parser import Formula
from megatron_stepkto.judging.formula_tokens import Token
from megatron_stepkto.judging.formula_values import Scope, Unreadable, Value, size_of

POINTS = 4  # at which equations with unknowns are compared
REMEMBERED = 8  # equations before this one that it may follow from
_TOLERANCE = 1e-9
_NO_VALUE = (Unreadable, OverflowError, ZeroDivisionError, ValueError, RecursionError)


@dataclass(frozen=True)
class _Verdict:
    """Of the equation whose sign stands at ``position``. ``right`` None: its sides differ; may it be called wrong?"""

    position: int
    right: bool | None
    chain: Chain
    number: int  # of the equation in its chain
    values: tuple[Fraction, Fraction] | None = None  # that certainly differ
    how: str = "values"


@dataclass
class _Known:
    """What the solution said so far."""

    equations: list[tuple[Formula, Formula]] = field(default_factory=list)
    definitions: dict[str, Formula] = field(default_factory=dict)  # by name, the latest
    functions: dict[str, tuple[str, Formula]] = field(default_factory=dict)
    texts: set[tuple[str, str]] = field(default_factory=set)

    def add(self, left: Formula, right: Formula) -> None:
        self.texts.add((left.text, right.text))
        self.equations.append((left, right))
        del self.equations[:-REMEMBERED]
        for name, other in ((left, right), (right, left)):
            if name.lone_name and not name.names & other.names:
                only = next(iter(name.names))
                self.definitions.pop(only, None)  # the order of insertion is the order of evaluation
                self.definitions[only] = other
            if name.called and f"{name.called[0]}()" not in other.names:
                self.functions[name.called[0]] = (name.called[1], other)

    def scope(self, seed: int | None) -> Scope:
        return Scope(seed=seed, functions={name: (at, body.value) for name, (at, body) in self.functions.items()})

    def defined(self, seed: int | None) -> Scope:
        """A scope in which defined names have their values."""
        scope = self.scope(seed)
        for name, formula in self.definitions.items():
            try:
                scope.values[name] = formula.value(scope)
            except _NO_VALUE:
                continue
        return scope


def formula_verdicts(
    problem: str, text: str, spans: Sequence[Sequence[int]], subject: Subject
) -> list[list[bool | None]]:
    """For each step, a verdict per equation of formulas in it that can be checked.

    Args:
        spans: first character of each step, and the one behind its last.
        subject: of the problem and its solution.

    Returns:
        True: it holds, or follows. False: its sides have two values, and all around it is understood. None: they have
        two values as read.
    """
    known = _Known()
    for chain in chains(problem):
        _verdicts(chain, known)
    found = [verdict for chain in chains(text) for verdict in _verdicts(chain, known)]
    steps: list[list[bool | None]] = []
    for start, end in spans:
        inside = [verdict for verdict in found if start <= verdict.position < end]
        words = StepWords(text[start:end], subject) if inside else None
        steps.append([
            False if verdict.values and words and _certainly_wrong(verdict, text, words) else verdict.right
            for verdict in inside
        ])  # fmt: skip
    return steps


def _verdicts(chain: Chain, known: _Known) -> list[_Verdict]:
    found = []
    pairs = zip(chain.sides, chain.sides[1:], chain.relations, strict=False)
    for number, (left, right, relation) in enumerate(pairs):
        if left is None or right is None or relation.text not in EQUALS:
            continue
        with contextlib.suppress(*_NO_VALUE):  # a number that no float holds: no verdict
            found += _of_pair(left, right, relation, chain, number, known)
    return found


def _of_pair(
    left: Formula, right: Formula, relation: Token, chain: Chain, number: int, known: _Known
) -> list[_Verdict]:
    about = relation.text != "="
    if not left.names and not right.names:
        if left.text != right.text and (left.rich or right.rich or about):
            return _of_values(left, right, about, relation.start, chain, number)
        return []
    how = _how(left, right, about, known)
    if not about and how != "identity":
        known.add(left, right)
    return [_Verdict(relation.start, True, chain, number, how=how)] if how else []


def _certainly_wrong(verdict: _Verdict, text: str, words: StepWords) -> bool:
    """Is an equation, whose sides differ as read, asserted and understood with all that stands around it?"""
    chain = verdict.chain
    before = plain_text(text[max(0, chain.start - MAX_CONTEXT) : chain.start])
    after = plain_text(text[chain.end : chain.end + MAX_CONTEXT])
    first, last = verdict.number == 0, verdict.number == len(chain.relations) - 1
    side = chain.sides[0].text if chain.sides[0] else ""
    assert verdict.values is not None
    one, other = verdict.values
    width = max(abs(one), abs(other)) / 10 if words.about else Fraction(0)
    return (
        words.usual
        and not words.inexact_quotients
        and asserted(before, after)
        and (not first or understood_before(before, side, lone=False))
        and (not last or understood_after(after, before))
        and not in_other_units(one, other, width, words, noun_after(after) if last else "")
        and not abs(one - other) <= width
        and not (one == -other and words.below)
    )


def _values(left: Formula, right: Formula, scope: Scope) -> tuple[Value, Value, float]:
    """Both values, and the largest number that their computation met."""
    first, second = left.value(scope), right.value(scope)
    return first, second, max(scope.scale, size_of(first), size_of(second))


def _near(first: Value, second: Value, scale: float) -> bool | None:
    """Are they equal but for rounding? None: rounding hides it."""
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first == second
    difference = abs(complex(first) - complex(second))
    size = max(size_of(first), size_of(second))
    if not math.isfinite(size):
        return None
    if difference > _TOLERANCE * max(size, 1e-30) and difference <= 1e-13 * scale:
        return True if size <= 1e-12 else None  # zero but for rounding; else whatever it is, rounding is as large
    return difference <= _TOLERANCE * max(size, 1e-30)


def _readings(left: Formula, right: Formula) -> list[Scope]:
    scopes = [Scope()]
    if left.open or right.open:
        scopes += [Scope(mixed=False), Scope(by_rest=True), Scope(percent=Fraction(1))]
    return scopes


def _of_values(left: Formula, right: Formula, about: bool, position: int, chain: Chain, number: int) -> list[_Verdict]:
    """The verdict on two sides without unknowns; none where a value is not known."""
    values: tuple[Value, Value] | None = None
    for scope in _readings(left, right):
        try:
            first, second, scale = _values(left, right, scope)
        except _NO_VALUE:
            continue
        near = _near(first, second, scale)
        if near or _rounded(first, second, left, right, about):
            return [_Verdict(position, True, chain, number)]
        if near is None:
            return []
        values = values or (first, second)
    if values is None:
        return []
    if about or left.open or right.open or not chain.whole or _cut_off(*values, left, right):
        return [_Verdict(position, None, chain, number)]
    exact = None
    if _rounds_inside(*values, left, right):
        return [_Verdict(position, None, chain, number)]
    if not isinstance(values[0], complex) and not isinstance(values[1], complex):
        exact = Fraction(values[0]), Fraction(values[1])
    return [_Verdict(position, None, chain, number, exact)]


def _rounds_inside(first: Value, second: Value, left: Formula, right: Formula) -> bool:
    r"""May the sides differ by the rounding of a decimal in them alone: ``10\sqrt{3} = 10(1.732)``?"""
    if not re.search(r"\d\.\d", f"{left.text} {right.text}"):
        return False
    return abs(complex(first) - complex(second)) <= 1e-2 * max(size_of(first), size_of(second))


def _cut_off(first: Value, second: Value, left: Formula, right: Formula) -> bool:
    """Is a lone number what is left of the other side when digits are cut off or rounded?"""
    for side in (left, right):
        if side.lone_number:
            unit = 10.0 ** -len(side.lone_number.partition(".")[2])
            if abs(complex(first) - complex(second)) < unit:
                return True
    return False


def _rounded(first: Value, second: Value, left: Formula, right: Formula, about: bool) -> bool:
    """Is a lone decimal the other side's rounding? "About" allows the last digit to be one off, and zeros as digits."""
    if isinstance(first, complex) or isinstance(second, complex):
        return False
    for side in (left, right):
        if not side.lone_number:
            continue
        whole, _, decimals = side.lone_number.partition(".")
        if not decimals and not about:
            continue
        zeros = len(whole) - len(whole.rstrip("0")) if about and not decimals and whole.strip("0") else 0
        unit = 10.0 ** (zeros - len(decimals))
        if abs(float(first) - float(second)) <= unit * (1.0 if about and not zeros else 0.5) * (1 + 1e-9):
            return True
    return False


def _how(left: Formula, right: Formula, about: bool, known: _Known) -> str:
    """How an equation with unknowns is known to hold; "" where it is not."""
    if (left.text, right.text) in known.texts or left.text == right.text:
        return ""
    for extra in _points(left, right):
        if all(_holds(left, right, _point(known.scope(seed), extra)) for seed in range(POINTS - 1)):
            return "identity"
    if (left.lone_name and right.lone_number) or (right.lone_name and left.lone_number):
        return "solved" if _solves(left, right, known) else ""
    if known.definitions and all(_holds(left, right, known.defined(seed), about) for seed in range(POINTS - 1)):
        return "substituted"
    return "derived" if _derived(left, right, known) else ""


def _points(left: Formula, right: Formula) -> list[dict[str, Value]]:
    """Values of names that have usual ones: i and e, beside any."""
    names = left.names | right.names
    points: list[dict[str, Value]] = [{}]
    if "i" in names:
        points.append({"i": 1j})
    if "e" in names:
        points.append({"e": 2.718281828459045, **({"i": 1j} if "i" in names else {})})
    return points


def _point(scope: Scope, extra: dict[str, Value]) -> Scope:
    scope.values.update(extra)
    return scope


def _holds(left: Formula, right: Formula, scope: Scope, about: bool = False) -> bool:
    try:
        first, second, scale = _values(left, right, scope)
    except _NO_VALUE:
        return False
    if _near(first, second, scale):
        return True
    return not (left.names and right.names) and _rounded(first, second, left, right, about)


def _solves(left: Formula, right: Formula, known: _Known) -> bool:
    """Does ``x = 3`` satisfy an equation in x from before?"""
    name, value = (left, right) if left.lone_name else (right, left)
    only = next(iter(name.names))
    if only in known.definitions and known.definitions[only].lone_number == value.lone_number:
        return False  # said before
    for first, second in reversed(known.equations):
        if only not in first.names | second.names or (first.lone_name and second.lone_number):
            continue
        scope = known.defined(None)
        try:
            scope.values[only] = value.value(scope)
        except _NO_VALUE:
            return False
        if _holds(first, second, scope):
            return True
    return False


def _differences(left: Formula, right: Formula, scopes: Sequence[Scope]) -> list[complex] | None:
    found = []
    for scope in scopes:
        try:
            first, second, _ = _values(left, right, scope)
        except _NO_VALUE:
            return None
        found.append(complex(first) - complex(second))
    return found


def _derived(left: Formula, right: Formula, known: _Known) -> bool:
    """Is the equation a multiple of one before, or of a sum of two, as it stands or with what names stand for?"""
    names = left.names | right.names
    for make in (known.scope, known.defined):
        if make == known.defined and not known.definitions:
            break
        scopes = [make(seed) for seed in range(POINTS)]
        new = _differences(left, right, scopes)
        if new is None or max(abs(n - new[0]) for n in new) < 1e-9:  # says nothing of an unknown
            continue
        olds = []
        for first, second in reversed(known.equations):
            if make == known.scope and not names & (first.names | second.names):
                continue
            old = _differences(first, second, [make(seed) for seed in range(POINTS)])
            if old is None or min(map(abs, old)) < 1e-9:
                continue
            if _proportional(new, old):
                return True
            olds.append(old)
        # two that contradict each other give every equation: their combination is a constant, too
        pairs = ((a, b) for n, a in enumerate(olds) for b in olds[:n])
        if any(_combined(new, a, b) and not _combined([1 + 0j] * POINTS, a, b) for a, b in pairs):
            return True
    return False


def _proportional(new: list[complex], old: list[complex]) -> bool:
    ratio = new[0] / old[0]
    if abs(ratio) <= 1e-9:
        return False
    return all(abs(a - ratio * b) <= 1e-8 * max(1, abs(a)) for a, b in zip(new, old, strict=True))


def _combined(new: list[complex], one: list[complex], two: list[complex]) -> bool:
    """Is ``new`` a sum of multiples of the other two, at all points?"""
    determinant = one[0] * two[1] - one[1] * two[0]
    if abs(determinant) < 1e-6:
        return False
    a = (new[0] * two[1] - new[1] * two[0]) / determinant
    b = (one[0] * new[1] - one[1] * new[0]) / determinant
    return all(abs(n - a * x - b * y) <= 1e-8 * max(1, abs(n)) for n, x, y in zip(new, one, two, strict=True))

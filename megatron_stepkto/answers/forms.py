"""Are two forms equal? True: proven. False: both were read and differ. None: undecided, which gives no label."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

import sympy  # type: ignore[import-untyped]

from megatron_stepkto.answers import algebra
from megatron_stepkto.answers.reading import (
    EMPTY,
    Assigned,
    Cells,
    Combined,
    Form,
    Literal,
    Many,
    Ratio,
    Reals,
    Relation,
    Scalar,
    Unreadable,
    is_equation,
)

Verdict = bool | None
T = TypeVar("T")


def equal(gold: Form, answer: Form) -> Verdict:
    """Raises Unreadable where a part of either form cannot be read."""
    if gold == answer:
        return True
    gold, answer = _computed(_unwrapped(gold)), _computed(_unwrapped(answer))
    if isinstance(gold, Literal) or isinstance(answer, Literal):
        return True if gold == answer else None
    if isinstance(gold, Assigned) or isinstance(answer, Assigned):
        return _equal_assigned(gold, answer)
    if isinstance(gold, Scalar) and isinstance(answer, Scalar):
        verdict = algebra.equal(gold.text, answer.text)
        return None if verdict and _may_be_codes(gold.text, answer.text) else verdict
    if is_equation(gold) or is_equation(answer):
        return _equal_equations(gold, answer)
    if _is_region(gold) or _is_region(answer):
        return _equal_regions(gold, answer)
    if isinstance(gold, Many) and isinstance(answer, Many):
        return _equal_many(gold, answer)
    if isinstance(gold, Cells) and isinstance(answer, Cells):
        return _equal_cells(gold, answer)
    if isinstance(gold, Ratio) or isinstance(answer, Ratio):
        return _equal_ratios(gold, answer)
    if isinstance(gold, Cells) or isinstance(answer, Cells):
        return _vector_and_tuple(gold, answer)
    many, single = (gold, answer) if isinstance(gold, Many) else (answer, gold)
    assert isinstance(many, Many)
    if _may_be_letters_of(many, single):
        return None
    return None if any(equal(item, single) is not False for item in many.items) and _maybe_one(many) else False


def _unwrapped(form: Form) -> Form:
    """{5} and x in {5} state the value 5."""
    return form.items[0] if isinstance(form, Many) and form.kind != "tuple" and len(form.items) == 1 else form


def _computed(form: Form) -> Form:
    """A sum or product of matrices as its cells."""
    if not isinstance(form, Scalar) or "\\begin" not in form.text:
        return form
    return Cells(tuple(tuple(Scalar(sympy.latex(cell)) for cell in row) for row in algebra.matrix(form.text)))


_CODE = re.compile(r"(?=.*[A-Z])[A-Z0-9]{2,}")
_LETTER = re.compile(r"[A-Z]")


def _code(text: str) -> str | None:
    """ABC, HHT or A12, which may be an order, a sequence or a code as well as a product; else None.

    Only upper-case letters: xy and yx are hardly ever anything but products.
    """
    text = re.sub(r"\s+", "", re.sub(r"\(([A-Z])\)", r"\1", text))
    return text if _CODE.fullmatch(text) else None


def _may_be_codes(gold: str, answer: str) -> bool:
    """Would two texts be equal only as products? The segments AB and BA are one, the orders BCA and ABC are not."""
    one, other = _code(gold), _code(answer)
    return one is not None and other is not None and one != other


def _may_be_letters_of(many: Many, single: Form) -> bool:
    """Does a text without commas name the letters of a list, as the choices A, C are often written AC?"""
    letters = [item.text for item in many.items if isinstance(item, Scalar) and _LETTER.fullmatch(item.text)]
    code = _code(single.text) if isinstance(single, Scalar) else None
    return code is not None and len(letters) == len(many.items) and sorted(letters) == sorted(code)


def _maybe_one(many: Many) -> bool:
    """Are all items the same value: {4, 2+2}?"""
    return all(equal(one, other) is not False for one, other in pairwise(many.items))


def _all(verdicts: Sequence[Verdict]) -> Verdict:
    return False if False in verdicts else None if None in verdicts else True


def _in_order(gold: Sequence[Form], answer: Sequence[Form]) -> Verdict:
    if len(gold) != len(answer):
        return False
    return _all([_tried(a, b) for a, b in zip(gold, answer, strict=True)])


def _in_any_order(gold: Sequence[T], answer: Sequence[T], same: Callable[[T, T], Verdict]) -> Verdict:
    """Do the items pair off? Equality is transitive, so the first partner is as good as any."""
    if len(gold) != len(answer):
        return False
    left, open_ones = list(answer), []
    for item in gold:
        verdicts = [same(item, other) for other in left]
        if True in verdicts:
            del left[verdicts.index(True)]
        elif None in verdicts:
            open_ones.append(item)
        else:
            return False
    return None if open_ones else True


def _distinct(items: Sequence[Form]) -> list[Form]:
    kept: list[Form] = []
    for item in items:
        if not any(_tried(item, other) is True for other in kept):
            kept.append(item)
    return kept


def _tried(a: Form, b: Form) -> Verdict:
    try:
        return equal(a, b)
    except Unreadable:
        return None


def _equal_many(gold: Many, answer: Many) -> Verdict:
    kinds = {gold.kind, answer.kind}
    if kinds == {"tuple"}:
        verdict = _in_order(gold.items, answer.items)
        if verdict is not True or gold.brackets == answer.brackets:
            return verdict
        # (1,2] is an interval; (1,2) and [1,2] may be points
        return False if {"(]", "[)"} & {gold.brackets, answer.brackets} else None
    solutions = all(isinstance(item, Many) for item in (*gold.items, *answer.items))
    if kinds == {"list"} and not solutions:
        return _in_any_order(gold.items, answer.items, _tried)
    if kinds == {"set"} or kinds == {"list"}:  # a solution that is listed twice is still one solution
        return _in_any_order(_distinct(gold.items), _distinct(answer.items), _tried)
    if kinds == {"set", "list"}:
        one, other = _distinct(gold.items), _distinct(answer.items)
        verdict = _in_any_order(one, other, _tried)
        repeats = len(one) + len(other) < len(gold.items) + len(answer.items)
        return None if verdict and repeats else verdict
    if kinds == {"tuple", "list"} and _in_order(gold.items, answer.items):
        return True
    # the values in another order, or a set and a tuple
    return None if _in_any_order(gold.items, answer.items, _tried) is not False else False


def _equal_cells(gold: Cells, answer: Cells) -> Verdict:
    if [len(row) for row in gold.rows] == [len(row) for row in answer.rows]:
        return _all([_in_order(a, b) for a, b in zip(gold.rows, answer.rows, strict=True)])
    return None if min(len(gold.rows), len(answer.rows)) == 1 else False


def _vector_and_tuple(gold: Form, answer: Form) -> Verdict:
    cells, other = (gold, answer) if isinstance(gold, Cells) else (answer, gold)
    assert isinstance(cells, Cells)
    flat = [item for row in cells.rows for item in row]
    if isinstance(other, Many) and 1 in (len(cells.rows), len(cells.rows[0])) and len(flat) == len(other.items):
        return _in_order(flat, other.items) if other.kind == "tuple" else None
    return False if isinstance(other, Scalar | Many | Cells) and len(flat) > 1 else None


def _equal_ratios(gold: Form, answer: Form) -> Verdict:
    if isinstance(gold, Ratio) and isinstance(answer, Ratio):
        return True if _in_order(gold.items, answer.items) else None if len(gold.items) == len(answer.items) else False
    ratio, other = (gold, answer) if isinstance(gold, Ratio) else (answer, gold)
    assert isinstance(ratio, Ratio)
    if isinstance(other, Scalar) and len(ratio.items) == 2:
        top, bottom = (_expression(item) for item in ratio.items)
        return True if algebra.equal_expressions(top / bottom, algebra.expression(other.text)) else None
    return None


def _expression(form: Form) -> sympy.Expr:
    if not isinstance(form, Scalar):
        raise Unreadable("an expression was expected")
    return algebra.expression(form.text)


# --- assignments -----------------------------------------------------------------------------------------------


def _equal_assigned(gold: Form, answer: Form) -> Verdict:
    if isinstance(gold, Assigned) and isinstance(answer, Assigned):
        return _equal_systems(gold, answer)
    assigned, other = (gold, answer) if isinstance(gold, Assigned) else (answer, gold)
    assert isinstance(assigned, Assigned)
    names = [name for name, _ in assigned.pairs]
    values = [value for _, value in assigned.pairs]
    if is_equation(other):
        if len(names) > 1 or not isinstance(values[0], Scalar):
            return None
        equation = Relation((names[0], values[0].text), ("=",))
        return _equal_equations(equation, other)
    if len(set(names)) == 1:
        alone = values[0] if len(values) == 1 else Many("list", tuple(values))
        return equal(alone, other) if assigned is gold else equal(other, alone)
    if not isinstance(other, Many) or other.kind == "set":
        return None if not isinstance(other, Scalar) else False
    if len(names) != len(other.items):
        return False
    written = _in_order(values, other.items)
    if other.kind == "list":
        return written or (None if _in_any_order(values, other.items, _tried) is not False else False)
    by_name = _in_order([value for _, value in sorted(assigned.pairs, key=lambda pair: pair[0])], other.items)
    return written if written == by_name else None


def _equal_systems(gold: Assigned, answer: Assigned) -> Verdict:
    """The same solutions: x=1, y=2 and x=3, y=4, in any order; a different name for the same value is undecided."""
    one, other = _solutions(gold), _solutions(answer)
    verdict = _in_any_order(one, other, _same_solution)
    names = [{name for name, _ in _single_names(form)} for form in (gold, answer)]
    if verdict is False and names[0] != names[1]:
        values, others = ([value for _, value in form.pairs] for form in (gold, answer))
        return None if _in_any_order(values, others, _tried) is not False else False
    return verdict


def _solutions(form: Assigned) -> list[dict[str, Form]]:
    """A repeated name begins the next solution, or is another value of the only name."""
    found: list[dict[str, Form]] = [{}]
    for name, value in _single_names(form):
        if name in found[-1]:
            found.append({})
        found[-1][name] = value
    return found


def _single_names(form: Assigned) -> Iterator[tuple[str, Form]]:
    """(x,y) = (1,2) as x = 1 and y = 2."""
    for name, value in form.pairs:
        names = name.strip("()").split(",")
        if len(names) > 1 and isinstance(value, Many) and len(value.items) == len(names):
            yield from zip(names, value.items, strict=True)
        else:
            yield name, value


def _same_solution(a: dict[str, Form], b: dict[str, Form]) -> Verdict:
    return _all([_tried(a[name], b[name]) for name in a]) if a.keys() == b.keys() else False


# --- equations -------------------------------------------------------------------------------------------------


def _equal_equations(gold: Form, answer: Form) -> Verdict:
    """Equations are equal where their polynomials have the same factors. A value against an equation is wrong where it
    does not solve it, else undecided."""
    if is_equation(gold) and is_equation(answer):
        factors, others = _factors(_difference(gold)), _factors(_difference(answer))
        return None if factors is None or others is None else factors == others
    equation, other = (gold, answer) if is_equation(gold) else (answer, gold)
    difference = _difference(equation)
    if not isinstance(other, Scalar) or algebra.expression(other.text).free_symbols:
        return None
    value = algebra.expression(other.text)
    if len(difference.free_symbols) == 1:
        at_value = difference.subs(next(iter(difference.free_symbols)), value)
        return False if algebra.equal_expressions(at_value, sympy.Integer(0)) is False else None
    constant = difference.subs(dict.fromkeys(difference.free_symbols, 0))  # xy = 6 may answer "what is xy?"
    return False if algebra.equal_expressions(constant**2, value**2) is False else None


def _difference(form: Form) -> sympy.Expr:
    assert isinstance(form, Relation)
    left, right = (algebra.expression(side) for side in form.sides)
    return left.doit() - right.doit()


def _factors(difference: sympy.Expr) -> set[sympy.Expr] | None:
    """The factors with unknowns of an equation's numerator, each with leading coefficient 1; None: not a polynomial."""
    numerator = sympy.numer(sympy.together(difference))
    if not numerator.is_polynomial(*numerator.free_symbols):
        return None
    _, factors = sympy.factor_list(numerator)
    symbols = sorted(numerator.free_symbols, key=str)
    return {sympy.Poly(factor, *symbols).monic().as_expr() for factor, _ in factors if factor.free_symbols}


# --- intervals and inequalities --------------------------------------------------------------------------------


def _is_region(form: Form) -> bool:
    return isinstance(form, Combined | Reals | Relation) or form == EMPTY


def _equal_regions(gold: Form, answer: Form) -> Verdict:
    if {type(gold), type(answer)} <= {Relation} and len(_unknowns(gold) | _unknowns(answer)) > 1:
        return _equal_inequalities(gold, answer)
    for form, other in ((gold, answer), (answer, gold)):
        if isinstance(form, Scalar | Assigned | Cells | Ratio):
            return _region_and_value(other, form)
    return equal_sets(_region(gold), _region(answer))


def _region_and_value(region: Form, value: Form) -> Verdict:
    found = _region(region)
    if isinstance(value, Scalar):
        if value.text in (r"\phi", r"\varphi", "\\Phi"):  # sometimes used for the empty set
            return None
        if isinstance(found, sympy.FiniteSet) and len(found) == 1:
            return algebra.equal_expressions(found.args[0], algebra.expression(value.text))
        holes = sympy.Complement(sympy.S.Reals, found) if not found.free_symbols else None
        return None if isinstance(holes, sympy.FiniteSet) else False
    return None


def _unknowns(form: Form) -> set[sympy.Symbol]:
    assert isinstance(form, Relation)
    return {symbol for side in form.sides for symbol in algebra.expression(side).free_symbols}


def _equal_inequalities(gold: Form, answer: Form) -> Verdict:
    """Of several unknowns: equal where the differences of the sides are the same up to a positive factor."""
    if not isinstance(gold, Relation) or not isinstance(answer, Relation) or len(gold.sides) + len(answer.sides) > 4:
        return None
    normal = []
    for form in (gold, answer):
        difference = sympy.expand(_difference(form))
        operator = form.operators[0]
        if operator in (">", ">="):
            difference, operator = -difference, operator.replace(">", "<")
        normal.append((difference, operator))
    (one, first), (other, second) = normal
    factor = sympy.simplify(one / other)
    return True if first == second and not factor.free_symbols and algebra.sign(factor) == 1 else None


def _region(form: Form) -> sympy.Set:
    """The set of real numbers that a form describes.

    Raises:
        Unreadable: it does not describe a set, or the set cannot be computed.
    """
    if isinstance(form, Reals):
        return sympy.S.Reals
    if form == EMPTY:
        return sympy.S.EmptySet
    if isinstance(form, Many):
        return _interval_or_points(form)
    if isinstance(form, Scalar):
        return sympy.FiniteSet(_real(form.text))
    if isinstance(form, Relation):
        return _solved(form)
    if not isinstance(form, Combined):
        raise Unreadable("not a set of real numbers")
    parts = [_region(part) for part in form.parts]
    if form.operator == r"\setminus":
        return sympy.Complement(parts[0], sympy.Union(*parts[1:]))
    both = sympy.Intersection(*parts)
    if form.operator == r"\cap":
        return both
    # "x < -2, x > 1" and "x < -2 and x > 1" mean either; "x > -2, x < 3" means both
    return both if form.operator == "," and both != sympy.S.EmptySet else sympy.Union(*parts)


def _real(text: str) -> sympy.Expr:
    value = algebra.expression(text).doit()
    if value in (sympy.oo, -sympy.oo):
        return value
    return value.xreplace({symbol: sympy.Symbol(symbol.name, real=True) for symbol in value.free_symbols})


def _interval_or_points(form: Many) -> sympy.Set:
    if form.kind == "tuple":
        if len(form.items) != 2 or not all(isinstance(item, Scalar) for item in form.items):
            raise Unreadable("a tuple among sets")
        start, end = (_real(item.text) for item in form.items if isinstance(item, Scalar))
        return sympy.Interval(start, end, form.brackets[0] == "(", form.brackets[1] == ")")
    return sympy.Union(*[_region(item) for item in form.items])


_RELATIONS = {"<": sympy.Lt, ">": sympy.Gt, "<=": sympy.Le, ">=": sympy.Ge, "!=": sympy.Ne, "=": sympy.Eq}
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}


def _solved(form: Relation) -> sympy.Set:
    """The solutions of a chain of inequalities of one real unknown."""
    sides = [_real(side) for side in form.sides]
    unknowns = {symbol for side in sides for symbol in side.free_symbols}
    alone = [side for side in sides if side.is_Symbol]
    unknown = next(iter(alone or unknowns), None)
    if unknown is None:
        raise Unreadable("a relation without an unknown")
    parts = [
        _half_line(left, operator, right, unknown)
        for (left, right), operator in zip(pairwise(sides), form.operators, strict=True)
    ]
    return sympy.Intersection(*parts)


def _half_line(left: sympy.Expr, operator: str, right: sympy.Expr, unknown: sympy.Symbol) -> sympy.Set:
    if right == unknown:
        left, operator, right = right, _FLIPPED[operator], left
    if left == unknown and unknown not in right.free_symbols:
        if operator in ("<", "<="):
            return sympy.Interval(-sympy.oo, right, True, operator == "<")
        if operator in (">", ">="):
            return sympy.Interval(right, sympy.oo, operator == ">", True)
        return sympy.Complement(sympy.S.Reals, sympy.FiniteSet(right))
    if (left.free_symbols | right.free_symbols) != {unknown}:
        raise Unreadable("an inequality of several unknowns")
    try:
        return sympy.solveset(_RELATIONS[operator](left, right), unknown, sympy.S.Reals)
    except (NotImplementedError, ValueError, TypeError) as error:
        raise Unreadable("an inequality that cannot be solved") from error


def equal_sets(a: sympy.Set, b: sympy.Set) -> Verdict:
    """Sets of real numbers: the same intervals and points, with ends that are exactly equal."""
    if a == b:
        return True
    one, other = _components(a), _components(b)
    return None if one is None or other is None else _in_any_order(one, other, _same_component)


Component = tuple[sympy.Expr, sympy.Expr, bool, bool]


def _components(found: sympy.Set) -> list[Component] | None:
    """Each interval and point as (start, end, open at start, open at end)."""
    if isinstance(found, sympy.Union):
        lists = [_components(part) for part in found.args]
        return None if None in lists else [part for parts in lists for part in parts or ()]
    if isinstance(found, sympy.Interval):
        return [(found.start, found.end, bool(found.left_open), bool(found.right_open))]
    if isinstance(found, sympy.FiniteSet):
        return [(value, value, False, False) for value in found.args]
    return [] if found == sympy.S.EmptySet else None


def _same_component(a: Component, b: Component) -> Verdict:
    if a[2:] != b[2:]:
        return False
    return _all([algebra.equal_expressions(a[0], b[0]), algebra.equal_expressions(a[1], b[1])])

"""Values that an answer can have, and their equality: exact for rational numbers, relative for others."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import mpmath

from vime.rewards.latex_tokens import NoAnswer, Unreadable, unit_of

DIGITS = 50
AGREEING = mpmath.mpf(10) ** -12
"""Largest relative difference of equal values of which one is irrational; a decimal must be as close to it."""
MOST_BITS = 200_000
"""Of an exact integer; larger ones are compared to DIGITS digits."""
MOST_EXPONENT = 10**15
_POINTS = (
    (Fraction(17, 13), Fraction(29, 23), Fraction(37, 31), Fraction(43, 41)),
    (Fraction(53, 19), Fraction(7, 11), Fraction(61, 47), Fraction(5, 3)),
)
Number = Any
"""A Fraction where it is exact, else an mpmath number."""


@dataclass(frozen=True)
class Node:
    """An expression: `op` with `args` that are nodes, or `value` of a number or name of a symbol."""

    op: str
    args: tuple[Node, ...] = ()
    value: Any = None

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Free variables."""
        if self.op == "symbol" and self.value not in ("pi", "e", "i", "infinity"):
            return frozenset((self.value,))
        return frozenset().union(*(each.names for each in self.args))

    @functools.cached_property
    def ops(self) -> frozenset[str]:
        return frozenset((self.op,)).union(*(each.ops for each in self.args))


@dataclass(frozen=True)
class Quantity:
    """An expression with its unit."""

    node: Node
    unit: str = ""
    percent: bool = False


@dataclass(frozen=True)
class Items:
    """Elements in brackets, or a list of them without any."""

    kind: Literal["list", "set", "bracket", "ratio", "union", "matrix"]
    elements: tuple[Value, ...]
    brackets: str = ""
    columns: int = 0
    """Of a matrix, whose elements come row by row."""


@dataclass(frozen=True)
class Named:
    """`x = value`."""

    name: str
    value: Value


@dataclass(frozen=True)
class Equation:
    """Both sides of an equation that names no value."""

    left: Node
    right: Node


@dataclass(frozen=True)
class Words:
    """Text that is no mathematics, in lower case."""

    text: str


Value = Quantity | Items | Named | Equation | Words
INFINITY = Quantity(Node("symbol", value="infinity"))


def number(value: Fraction | int) -> Node:
    return Node("number", value=Fraction(value))


# Numbers


def evaluate(node: Node, values: dict[str, Fraction]) -> Number:
    """The value with `values` for the variables. Raises NoAnswer, Unreadable, ZeroDivisionError."""
    if node.op == "number":
        return node.value
    if node.op == "symbol":
        return _symbol(node.value, values)
    args = [evaluate(each, values) for each in node.args]
    if node.op in ("+", "-", "*", "/", "neg"):
        return _arithmetic(node.op, args)
    if node.op == "^":
        return _power(args[0], args[1])
    if node.op == "abs":
        return abs(args[0])
    if node.op == "floor":
        return Fraction(math.floor(args[0])) if isinstance(args[0], Fraction) else mpmath.floor(args[0])
    if node.op == "ceil":
        return Fraction(math.ceil(args[0])) if isinstance(args[0], Fraction) else mpmath.ceil(args[0])
    if node.op == "!":
        return _factorial(args[0])
    if node.op == "binom":
        return _binomial(args[0], args[1])
    return _function(node.op, args)


def _symbol(name: str, values: dict[str, Fraction]) -> Number:
    if name in values:
        return values[name]
    constants = {"pi": mpmath.pi, "e": mpmath.e, "infinity": mpmath.inf}
    return mpmath.mpc(0, 1) if name == "i" else +constants[name]


def _inexact(value: Number) -> Any:
    return mpmath.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _arithmetic(op: str, args: list[Number]) -> Number:
    if op == "neg":
        return -args[0]
    left, right = args
    if not (isinstance(left, Fraction) and isinstance(right, Fraction)):
        left, right = _inexact(left), _inexact(right)
    if op == "/":
        if right == 0:
            raise ZeroDivisionError
        return left / right
    return left + right if op == "+" else left - right if op == "-" else left * right


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(exponent, Fraction) and isinstance(base, Fraction):
        if base == 0 and exponent < 0:
            raise ZeroDivisionError
        if exponent.denominator == 1:
            bits = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent.numerator)
            if bits <= MOST_BITS or abs(base) in (0, 1):
                return base ** int(exponent) if abs(base) not in (0, 1) else base ** int(exponent.numerator % 2 + 2)
        elif base > 0 and (root := _exact_root(base, exponent)) is not None:
            return root
    large = _inexact(exponent)
    if abs(large) > MOST_EXPONENT and not mpmath.isinf(large):
        raise NoAnswer("an exponent beyond any answer")
    return mpmath.power(_inexact(base), large)


def _exact_root(base: Fraction, exponent: Fraction) -> Fraction | None:
    degree = exponent.denominator
    if degree > 64 or abs(exponent.numerator) > 64 or max(base.numerator, base.denominator).bit_length() > 512:
        return None
    top, bottom = (_integer_root(each, degree) for each in (base.numerator, base.denominator))
    return None if top is None or bottom is None else Fraction(top, bottom) ** exponent.numerator


def _integer_root(value: int, degree: int) -> int | None:
    low = int(mpmath.nint(mpmath.root(value, degree)))
    return low if low**degree == value else None


def _factorial(value: Number) -> Number:
    if isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= 5000:
        return Fraction(math.factorial(int(value)))
    if abs(_inexact(value)) > MOST_EXPONENT:
        raise NoAnswer("a factorial beyond any answer")
    return mpmath.factorial(_inexact(value))


def _binomial(top: Number, bottom: Number) -> Number:
    whole = all(isinstance(each, Fraction) and each.denominator == 1 and 0 <= each <= 5000 for each in (top, bottom))
    if whole:
        return Fraction(math.comb(int(top), int(bottom)))
    if max(abs(_inexact(top)), abs(_inexact(bottom))) > MOST_EXPONENT:
        raise NoAnswer("a binomial coefficient beyond any answer")
    return mpmath.binomial(_inexact(top), _inexact(bottom))


def _function(name: str, args: list[Number]) -> Number:
    values = [_inexact(each) for each in args]
    if name == "log" and len(values) == 2:
        return mpmath.log(values[0], values[1])
    functions = {
        "sin": mpmath.sin, "cos": mpmath.cos, "tan": mpmath.tan, "cot": mpmath.cot, "sec": mpmath.sec,
        "csc": mpmath.csc, "arcsin": mpmath.asin, "arccos": mpmath.acos, "arctan": mpmath.atan, "sinh": mpmath.sinh,
        "cosh": mpmath.cosh, "tanh": mpmath.tanh, "log": mpmath.log, "ln": mpmath.log, "lg": mpmath.log10,
        "exp": mpmath.exp,
    }  # fmt: skip
    if name in ("sin", "cos", "tan", "exp") and abs(values[0]) > MOST_EXPONENT:
        raise NoAnswer("an argument beyond any answer")
    return functions[name](values[0])


def close(left: Number, right: Number) -> bool:
    """Equal, exactly for rational numbers; relatively to AGREEING where one is not."""
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    left, right = _inexact(left), _inexact(right)
    if mpmath.isnan(left) or mpmath.isnan(right):
        return False
    if mpmath.isinf(left) or mpmath.isinf(right):
        return bool(left == right)
    size = max(abs(left), abs(right))
    # A sum that cancels to 0, like sin^2 x + cos^2 x - 1, leaves a rest as small as the precision.
    rest = (left == 0 or right == 0) and size < mpmath.mpf(10) ** (8 - DIGITS)
    return bool(rest or abs(left - right) <= AGREEING * size)


def same_node(left: Node, right: Node, factor: Fraction = Fraction(1)) -> bool:
    """True where `left` equals `factor` times `right`: at two points, if they have variables."""
    names = sorted(left.names | right.names)
    if not names:
        return close(evaluate(left, {}), _times(evaluate(right, {}), factor))
    compared = 0
    for values in _assignments(
        names, signed=not (left.ops | right.ops) & {"^", "log", "ln", "lg"} or _whole_powers(left, right)
    ):
        try:
            pair = evaluate(left, values), _times(evaluate(right, values), factor)
        except ZeroDivisionError:
            continue
        if not close(*pair):
            return False
        compared += 1
    return compared > 0


def _times(value: Number, factor: Fraction) -> Number:
    return value if factor == 1 else _arithmetic("*", [value, factor])


def _whole_powers(*nodes: Node) -> bool:
    """True where every exponent is a whole number, so that negative values of variables are no matter of branches."""
    for node in nodes:
        if node.op in ("log", "ln", "lg"):
            return False
        if node.op == "^":
            exponent = node.args[1]
            if exponent.names or "number" not in exponent.ops:
                return False
            value = evaluate(exponent, {})
            if not (isinstance(value, Fraction) and value.denominator == 1):
                return False
        if not _whole_powers(*node.args):
            return False
    return True


def _assignments(names: list[str], *, signed: bool) -> list[dict[str, Fraction]]:
    found = []
    for number_, points in enumerate(_POINTS):
        for sign in (1, -1) if signed else (1,):
            found.append(
                {
                    name: sign * (points[place % len(points)] + place // len(points) + Fraction(number_, 97))
                    for place, name in enumerate(names)
                }
            )
    return found


# Equality of values


def equal(answer: Value, label: Value) -> bool:
    """True where the two mean the same. Raises NoAnswer."""
    with mpmath.workdps(DIGITS):
        try:
            return _equal(answer, label)
        except ZeroDivisionError:
            return False
        except RecursionError as error:
            raise NoAnswer("an answer nested too deeply") from error
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise Unreadable(str(error)[:80]) from error


def _equal(answer: Value, label: Value) -> bool:
    if isinstance(answer, Named) and isinstance(label, Named):
        return answer.name == label.name and _equal(answer.value, label.value)
    if isinstance(answer, Equation) or isinstance(label, Equation):
        return _same_equation(answer, label)
    answer, label = _unnamed(answer), _unnamed(label)
    if isinstance(answer, Items) and len(answer.elements) == 1 and answer.kind in ("list", "set"):
        return _equal(answer.elements[0], label) or (isinstance(label, Items) and _same_items(answer, label))
    if isinstance(label, Items) and len(label.elements) == 1 and label.kind in ("list", "set"):
        return _equal(answer, label.elements[0])
    if isinstance(answer, Words) and isinstance(label, Words):
        return answer.text == label.text
    if isinstance(answer, Items) and isinstance(label, Items):
        return _same_items(answer, label)
    if isinstance(answer, Quantity) and isinstance(label, Quantity):
        return _same_quantity(answer, label)
    return _ratio_is_number(answer, label) or _ratio_is_number(label, answer)


def _unnamed(value: Value) -> Value:
    return value.value if isinstance(value, Named) else value


def _ratio_is_number(ratio: Value, other: Value) -> bool:
    if not (isinstance(ratio, Items) and ratio.kind == "ratio" and isinstance(other, Quantity)):
        return False
    first, second = ratio.elements[0], ratio.elements[-1]
    if len(ratio.elements) != 2 or not (isinstance(first, Quantity) and isinstance(second, Quantity)):
        return False
    return _same_quantity(Quantity(Node("/", (first.node, second.node))), other)


def _same_quantity(answer: Quantity, label: Quantity) -> bool:
    if answer.percent != label.percent:
        return any(same_node(answer.node, label.node, factor) for factor in (Fraction(1), *_percents(answer)))
    if answer.unit == label.unit or not answer.unit or not label.unit:
        return same_node(answer.node, label.node) or _is_angle(answer, label) or _is_angle(label, answer)
    if answer.unit.startswith("base") and label.unit.startswith("base"):
        return _in_base(answer) == _in_base(label)
    given, wanted = _dimension(answer.unit), _dimension(label.unit)
    if given is None or wanted is None:
        return same_node(answer.node, label.node)
    if given[0] != wanted[0]:
        return "any" in (given[0] + wanted[0]) and same_node(answer.node, label.node)
    return same_node(answer.node, label.node, wanted[1] / given[1])


def _percents(answer: Quantity) -> tuple[Fraction, ...]:
    return (Fraction(100),) if answer.percent else (Fraction(1, 100),)


def _is_angle(degrees: Quantity, radians: Quantity) -> bool:
    if degrees.unit != "degree" or radians.unit or "pi" not in _constants(radians.node):
        return False
    return same_node(Node("*", (degrees.node, Node("symbol", value="pi"))), radians.node, Fraction(180))


def _constants(node: Node) -> set[str]:
    own = {node.value} if node.op == "symbol" else set()
    return own.union(*(_constants(each) for each in node.args))


def _in_base(quantity: Quantity) -> int | None:
    base = int(quantity.unit.removeprefix("base"))
    value = quantity.node.value
    if not 2 <= base <= 36 or not isinstance(value, Fraction) or value.denominator != 1:
        raise Unreadable("a number in this base")
    return int(str(value), base)


def _dimension(unit: str) -> tuple[str, Fraction] | None:
    """Dimensions with exponents, and the factor, of a unit such as `cm^2` or `m/s`."""
    dimensions, factor = [], Fraction(1)
    for part in re.findall(r"[*/]?[^*/]+", unit):
        name, _, exponent = part.lstrip("*/").partition("^")
        power = int(exponent or 1) * (-1 if part.startswith("/") else 1)
        found = unit_of(name)
        if found is None:
            return None
        dimensions.append(f"{found[0]}^{power}")
        factor *= Fraction(found[1]) ** power
    return " ".join(sorted(dimensions)), factor


_UNORDERED = ("list", "set", "union")


def _same_items(answer: Items, label: Items) -> bool:
    kinds = {answer.kind, label.kind}
    if "matrix" in kinds:
        return _same_matrix(answer, label)
    if kinds == {"set"}:
        return _covers(answer.elements, label.elements) and _covers(label.elements, answer.elements)
    if len(answer.elements) != len(label.elements):
        return False
    if kinds <= set(_UNORDERED):
        return _matches(list(answer.elements), list(label.elements))
    if answer.kind == label.kind == "ratio":
        return _same_ratio(answer, label)
    if kinds in ({"bracket"}, {"bracket", "list"}) and (
        not answer.brackets or not label.brackets or answer.brackets == label.brackets
    ):
        return all(_equal(a, b) for a, b in zip(answer.elements, label.elements, strict=True))
    return False


def _covers(elements: tuple[Value, ...], others: tuple[Value, ...]) -> bool:
    return all(any(_equal(each, other) for other in others) for each in elements)


def _matches(elements: list[Value], others: list[Value]) -> bool:
    """True where every element has another partner of the same value."""
    for each in elements:
        partner = next((place for place, other in enumerate(others) if _equal(each, other)), None)
        if partner is None:
            return False
        del others[partner]
    return True


def _same_ratio(answer: Items, label: Items) -> bool:
    pairs = list(zip(answer.elements, label.elements, strict=True))
    firsts = [pairs[0][0], pairs[0][1]]
    if not all(isinstance(each, Quantity) for pair in pairs for each in pair):
        return False
    first = [each.node for each in firsts if isinstance(each, Quantity)]
    return all(
        same_node(Node("*", (a.node, first[1])), Node("*", (b.node, first[0])))
        for a, b in pairs
        if isinstance(a, Quantity) and isinstance(b, Quantity)
    )


def _same_matrix(answer: Items, label: Items) -> bool:
    if answer.kind == label.kind and answer.columns != label.columns:
        return False
    for one in (answer, label):
        if (
            one.kind == "matrix"
            and answer.kind != label.kind
            and 1 not in (one.columns, len(one.elements) // one.columns)
        ):
            return False
    if {answer.kind, label.kind} - {"matrix", "bracket", "list"} or len(answer.elements) != len(label.elements):
        return False
    return all(_equal(a, b) for a, b in zip(answer.elements, label.elements, strict=True))


def _same_equation(answer: Value, label: Value) -> bool:
    """Equations are equal if their differences of both sides are proportional; `y = f` also equals the bare `f`."""
    left, right = _sides(answer), _sides(label)
    if left is None or right is None:
        if (isinstance(answer, Equation) and isinstance(label, Quantity)) or isinstance(answer, Quantity):
            return False
        return isinstance(answer, Items) and len(answer.elements) == 1 and _same_equation(answer.elements[0], label)
    names = sorted(left.names | right.names)
    if left.names != right.names or not names:
        return False
    ratio: Number = None
    for values in _assignments(names, signed=_whole_powers(left, right)):
        a, b = evaluate(left, values), evaluate(right, values)
        if close(b, Fraction(0)) or close(a, Fraction(0)):
            return False
        now = _arithmetic("/", [a, b])
        if ratio is not None and not close(ratio, now):
            return False
        ratio = now
    return True


def _sides(value: Value) -> Node | None:
    """Left minus right side of an equation."""
    if isinstance(value, Equation):
        return Node("-", (value.left, value.right))
    if isinstance(value, Named) and isinstance(value.value, Quantity) and re.fullmatch(r"[A-Za-z]\w*", value.name):
        return Node("-", (Node("symbol", value=value.name), value.value.node))
    return None

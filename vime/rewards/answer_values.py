"""Values that an answer can have, and when two of them mean the same."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import mpmath

from vime.rewards.answer_numbers import DIGITS, Node, proportional, same_node
from vime.rewards.latex_tokens import NoAnswer, Unreadable, unit_of


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
    return proportional(left, right)


def _sides(value: Value) -> Node | None:
    """Left minus right side of an equation."""
    if isinstance(value, Equation):
        return Node("-", (value.left, value.right))
    if isinstance(value, Named) and isinstance(value.value, Quantity) and re.fullmatch(r"[A-Za-z]\w*", value.name):
        return Node("-", (Node("symbol", value=value.name), value.value.node))
    return None

"""Expressions of an answer, their numbers, and equality: exact for rational numbers, relative for others."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import mpmath

from vime.rewards.latex_tokens import NoAnswer

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


def proportional(left: Node, right: Node) -> bool:
    """True where `left` is a constant times `right`, with the same variables, of which there has to be one."""
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

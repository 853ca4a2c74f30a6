"""Reader of final answers: text in LaTeX or plain writing to values that can be compared.

One module since it is one grammar: a recursive descent whose rules call each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Literal

from vime.rewards.answer_numbers import Node, number
from vime.rewards.answer_values import INFINITY, Equation, Items, Named, Quantity, Value, Words
from vime.rewards.latex_tokens import NoAnswer, Token, Unreadable, tokenise

MOST_CHARACTERS = 4000
"""Longer answers are not read."""
MOST_DEPTH = 60
MOST_TOKENS = 1000
_RELATIONS = ("=", "<", ">", "<=", ">=", "in", "!=")
_CLOSING = {"(": (")", "]"), "[": ("]", ")"), "{": ("}",), "\\{": ("\\}",)}
_FACTOR_BEGINS = frozenset(("(", "{", "frac", "binom", "group", "overline", "lfloor", "lceil"))


def readings(text: str) -> Iterator[Value]:
    """The values that a text can mean: `1,234` is a number and a list of two. Raises Unreadable, NoAnswer."""
    if len(text) > MOST_CHARACTERS:
        raise NoAnswer(f"an answer of {len(text)} characters")
    plain = tokenise(text, commas=False)
    grouped = tokenise(text, commas=True)
    try:
        if grouped != plain:
            yield _Parser(grouped).whole()
        yield _Parser(plain).whole()
    except RecursionError as error:
        raise NoAnswer("an answer nested too deeply") from error


class _Parser:
    def __init__(self, tokens: list[Token]) -> None:
        if len(tokens) > MOST_TOKENS:
            raise NoAnswer(f"an answer of {len(tokens)} parts")
        self.tokens, self.place, self.depth, self.bars = tokens, 0, 0, 0
        self.reversed = False
        """True in `]a, b[`, where the second bracket is no factor."""
        self.base = ""
        """Unit of a number with a base as its subscript."""

    def whole(self) -> Value:
        """All tokens as one value."""
        while self.tokens and self.tokens[-1].text in (".", ",", ";", "row") and self.tokens[-1].kind == "mark":
            self.tokens = self.tokens[:-1]
        value = self._list()
        if self.place < len(self.tokens):
            raise Unreadable(self.tokens[self.place].text)
        return value

    # Looking at tokens

    def _is(self, *marks: str) -> bool:
        return (
            self.place < len(self.tokens)
            and self.tokens[self.place].kind == "mark"
            and self.tokens[self.place].text in marks
        )

    def _kind(self, ahead: int = 0) -> str:
        place = self.place + ahead
        return self.tokens[place].kind if place < len(self.tokens) else "end"

    def _take(self) -> Token:
        if self.place >= len(self.tokens):
            raise Unreadable("an answer that breaks off")
        self.place += 1
        return self.tokens[self.place - 1]

    def _accept(self, *marks: str) -> str | None:
        return self._take().text if self._is(*marks) else None

    def _expect(self, mark: str) -> None:
        if not self._accept(mark):
            raise Unreadable(f"{mark} is missing")

    # Lists, unions, relations

    def _list(self) -> Value:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise NoAnswer("an answer nested too deeply")
        elements = self._elements()
        self.depth -= 1
        return elements[0] if len(elements) == 1 else Items("list", tuple(elements))

    def _elements(self) -> list[Value]:
        elements = [*self._spread(self._union())]
        while self._accept(",", ";", "or"):
            while self._accept(",", "or"):
                pass
            elements += self._spread(self._union())
        return elements

    def _spread(self, value: Value) -> list[Value]:
        """Both values of a `±`."""
        if isinstance(value, Quantity) and "±" in value.node.ops:
            return [Quantity(_signed(value.node, sign), value.unit, value.percent) for sign in (1, -1)]
        if isinstance(value, Named):
            return [Named(value.name, each) for each in self._spread(value.value)]
        return [value]

    def _union(self) -> Value:
        parts = [self._relation()]
        while self._accept("cup"):
            parts.append(self._relation())
        return parts[0] if len(parts) == 1 else Items("union", tuple(parts))

    def _relation(self) -> Value:
        if self._kind() == "word" or (self._kind() == "unit" and self.tokens[self.place].text != "degree"):
            return self._words()
        sides, signs = [self._ratio()], []
        while self._is(*_RELATIONS):
            signs.append(self._take().text)
            sides.append(self._ratio())
        return sides[0] if not signs else _related(sides, signs)

    def _words(self) -> Value:
        """Words up to a separator; `name = value` and `… is value` give the value."""
        words = []
        while self.place < len(self.tokens) and not self._is(",", ";", "or", "=", ":", ")", "]", "}", "\\}"):
            words.append(self._take().text.lower())
        if self._is("=", ":") or (words and words[-1] in ("is", "are", "equals")):
            self._accept("=", ":")
            return Named(" ".join(words), self._relation())
        return Words(" ".join(word for word in words if word not in ("the", "a", "an")))

    def _ratio(self) -> Value:
        parts = [self._value()]
        while self._accept(":"):
            parts.append(self._value())
        return parts[0] if len(parts) == 1 else Items("ratio", tuple(parts))

    def _value(self) -> Value:
        """An expression with its unit, or something in brackets."""
        start = self.place
        if self._is("(", "[", "]", "\\{") or (self._is("{") and self._is_wrapping()):
            value = self._bracketed()
            if not isinstance(value, Quantity) or ((value.unit or value.percent) and self._ends_element()):
                return value
            self.place = start
        if self._kind() == "mark" and self.tokens[self.place].text.startswith("begin:"):
            return self._matrix()
        if self._kind() == "symbol" and self.tokens[self.place].text == "empty":
            self._take()
            return Items("set", ())
        money = self._accept("currency")
        negative = bool(money) is False and self._is("-") and self._currency_follows()
        if negative:
            self.place += 2
        node = self._sum()
        unit, self.base = self._unit() or self.base, ""
        if negative:
            node = Node("neg", (node,))
        if money or negative:
            unit = unit or "dollar"
        percent = self._accept("%") is not None
        return Quantity(node, unit, percent)

    def _currency_follows(self) -> bool:
        ahead = self.tokens[self.place + 1 : self.place + 2]
        return bool(ahead) and ahead[0].kind == "mark" and ahead[0].text == "currency"

    def _is_wrapping(self) -> bool:
        """True where the brace at hand closes at the end of its element."""
        depth = 0
        for place in range(self.place, len(self.tokens)):
            if self.tokens[place].kind == "mark":
                depth += (self.tokens[place].text == "{") - (self.tokens[place].text == "}")
            if depth == 0:
                return place + 1 == len(self.tokens) or self.tokens[place + 1].text in (",", ";", "or", ")", "]", "\\}")
        return False

    def _ends_element(self) -> bool:
        return self.place == len(self.tokens) or self._is(",", ";", "or", ")", "]", "}", "\\}")

    def _bracketed(self) -> Value:
        opening = self._take().text
        if opening == "]":
            self.reversed = True
            elements, closing = self._elements(), self._take().text
            self.reversed = False
            if closing not in ("[", "]") or len(elements) != 2:
                raise Unreadable("brackets")
            return Items("bracket", tuple(elements), "(" + (")" if closing == "[" else "]"))
        if opening == "\\{" and self._accept("\\}"):
            return Items("set", ())
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise NoAnswer("an answer nested too deeply")
        elements, closing = self._elements(), self._take().text
        self.depth -= 1
        if opening == "[" and closing == "[" and len(elements) == 2:
            closing = ")"
        if closing not in _CLOSING[opening]:
            raise Unreadable("brackets that do not match")
        if opening == "\\{":
            return Items("set", tuple(elements))
        if len(elements) == 1 and closing == _CLOSING[opening][0]:
            return elements[0]
        if opening == "{":
            return Items("list", tuple(elements))
        return Items("bracket", tuple(elements), opening + closing)

    def _matrix(self) -> Value:
        environment = self._take().text.removeprefix("begin:")
        if environment.strip("*") not in ("matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "array"):
            raise Unreadable(environment)
        rows: list[list[Value]] = [[self._value()]]
        while True:
            if self._accept("&"):
                rows[-1].append(self._value())
            elif self._accept("row"):
                if not self._is(f"end:{environment}"):
                    rows.append([self._value()])
            elif self._accept(f"end:{environment}"):
                break
            else:
                raise Unreadable("a matrix")
        if len({len(row) for row in rows}) > 1:
            raise Unreadable("a matrix with rows of different lengths")
        return Items("matrix", tuple(each for row in rows for each in row), columns=len(rows[0]))

    # Expressions

    def _group(self) -> Node:
        """An expression in braces or parentheses, whose bracket is already taken."""
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise NoAnswer("an answer nested too deeply")
        node = self._sum()
        self.depth -= 1
        return node

    def _sum(self) -> Node:
        node = self._term()
        while sign := self._accept("+", "-", "±"):
            node = Node(sign, (node, self._term()))
        return node

    def _term(self) -> Node:
        if sign := self._accept("-", "+", "±"):
            node = self._term()
            return node if sign == "+" else Node("neg" if sign == "-" else "±", (node,))
        node = self._factor()
        while True:
            if operator := self._accept("*", "/"):
                if operator == "/" and self._kind() in ("unit", "word"):
                    self.place -= 1
                    return node
                negative = self._accept("-")
                right = self._factor()
                node = Node(operator, (node, Node("neg", (right,)) if negative else right))
            elif self._continues():
                node = Node("*", (node, self._factor()))
            else:
                return node

    def _continues(self) -> bool:
        """True where another factor follows without an operator. Two numbers in a row are no product."""
        kind = self._kind()
        if kind in ("end", "unit", "word"):
            return False
        if kind == "number":
            raise NoAnswer("two numbers in a row")
        if kind == "mark":
            text = self.tokens[self.place].text
            product = text in _FACTOR_BEGINS or (text == "[" and not self.reversed)
            return product or (text == "|" and not self.bars)
        return True

    def _factor(self) -> Node:
        node = self._base()
        while True:
            if self._accept("!"):
                node = Node("!", (node,))
            elif self._accept("^"):
                node = Node("^", (node, self._exponent()))
            elif self._accept("'"):
                raise Unreadable("a prime")
            else:
                return node

    def _exponent(self) -> Node:
        if self._accept("{"):
            node = self._group()
            self._expect("}")
            return node
        if self._accept("-"):
            return Node("neg", (self._exponent(),))
        base = self._base()
        return Node("^", (base, self._exponent())) if self._accept("^") else base

    def _base(self) -> Node:
        token = self._take()
        if token.kind == "number":
            return self._number(token)
        if token.kind == "symbol":
            return self._symbol(token)
        if token.kind == "function":
            return self._function(token.text)
        if token.kind == "mark":
            return self._marked(token.text)
        raise Unreadable(token.text)

    def _number(self, token: Token) -> Node:
        value = _fraction(token.text)
        if self._is("overline") and "." in token.text:
            return self._repeating(token.text)
        if self._accept("_"):
            base = self._subscript()
            if self.base or not base.isdigit():
                raise Unreadable("a number in another base")
            self.base = f"base{base}"
            return number(value)
        if "." not in token.text and (part := self._fraction_part()) is not None:
            return number(value + part)
        return number(value)

    def _repeating(self, text: str) -> Node:
        """`0.1\\overline{6}`: the digits in the braces repeat."""
        self._take()
        self._expect("{")
        digits = self._take().text
        self._expect("}")
        if not digits.isdigit():
            raise Unreadable("digits under a line")
        decimals = len(text.partition(".")[2])
        return number(_fraction(text) + Fraction(int(digits), (10 ** len(digits) - 1) * 10**decimals))

    def _fraction_part(self) -> Fraction | None:
        """The fraction of a mixed number, of two plain numbers and below 1, that follows a whole number."""
        ahead = [(token.kind, token.text) for token in self.tokens[self.place : self.place + 7]]
        kinds = [text if kind == "mark" else kind for kind, text in ahead]
        top = bottom = ""
        if kinds[:3] == ["number", "/", "number"] and self.tokens[self.place].spaced:
            top, bottom, length = ahead[0][1], ahead[2][1], 3
        elif kinds[:7] == ["frac", "{", "number", "}", "{", "number", "}"]:
            top, bottom, length = ahead[2][1], ahead[5][1], 7
        elif kinds[:2] == ["frac", "number"] and len(ahead[1][1]) == 2 and ahead[1][1].isdigit():
            top, bottom, length = ahead[1][1][0], ahead[1][1][1], 2
        else:
            return None
        if not (top.isdigit() and bottom.isdigit() and 0 < int(top) < int(bottom)):
            return None
        self.place += length
        return Fraction(int(top), int(bottom))

    def _symbol(self, token: Token) -> Node:
        name = token.text
        if name == "empty":
            raise Unreadable("a set in an expression")
        if self._accept("_"):
            name += "_" + self._subscript()
        return Node("symbol", value=name)

    def _subscript(self) -> str:
        if not self._accept("{"):
            return self._take().text
        parts, depth = [], 1
        while depth:
            token = self._take()
            depth += (token.text == "{") - (token.text == "}")
            parts.append(token.text)
        return "".join(parts[:-1])

    def _function(self, name: str) -> Node:
        if name == "sqrt":
            degree = number(2)
            if self._accept("["):
                degree = self._group()
                self._expect("]")
            return Node("^", (self._argument(), Node("/", (number(1), degree))))
        base = power = None
        for _ in range(2):
            if self._accept("_"):
                base = self._argument()
            elif self._accept("^"):
                power = self._exponent()
        argument = self._function_argument()
        node = Node(name, (argument,) if base is None else (argument, base))
        if base is not None and name != "log":
            raise Unreadable("a subscript of a function")
        if power is None:
            return node
        if power == Node("neg", (number(1),)):
            raise Unreadable("an inverse function")
        return Node("^", (node, power))

    def _function_argument(self) -> Node:
        if self._accept("("):
            node = self._group()
            self._expect(")")
            return node
        node = self._factor()
        while self._kind() in ("symbol", "number") or self._is("frac", "{"):
            node = Node("*", (node, self._factor()))
        if self._kind() == "unit" and self.tokens[self.place].text == "degree":
            self._take()
            node = Node("/", (Node("*", (node, Node("symbol", value="pi"))), number(180)))
        return node

    def _argument(self) -> Node:
        """A command's argument: braces, parentheses, one symbol, or one digit of a number."""
        if self._accept("{"):
            node = self._group()
            self._expect("}")
            return node
        if self._accept("("):
            node = self._group()
            self._expect(")")
            return node
        token = self._take()
        if token.kind == "number" and token.text.isdigit() and len(token.text) > 1:
            self.place -= 1
            self.tokens = [*self.tokens[: self.place], Token("number", token.text[1:]), *self.tokens[self.place + 1 :]]
            return number(int(token.text[0]))
        if token.kind in ("number", "symbol"):
            return number(_fraction(token.text)) if token.kind == "number" else Node("symbol", value=token.text)
        self.place -= 1
        return self._base()

    def _marked(self, mark: str) -> Node:
        pairs = {"(": ")", "[": "]", "{": "}", "lfloor": "rfloor", "lceil": "rceil"}
        if mark in pairs:
            node = self._group()
            self._expect(pairs[mark])
            return Node("floor" if mark == "lfloor" else "ceil", (node,)) if mark in ("lfloor", "lceil") else node
        if mark == "frac":
            top = self._argument()
            return Node("/", (top, self._argument()))
        if mark == "binom":
            top = self._argument()
            return Node("binom", (top, self._argument()))
        if mark == "group":
            return self._argument()
        if mark == "overline":
            return Node("symbol", value="overline:" + self._subscript())
        if mark == "|":
            self.bars += 1
            node = self._sum()
            self._expect("|")
            self.bars -= 1
            return Node("abs", (node,))
        raise Unreadable(mark)

    def _unit(self) -> str:
        """The unit behind an expression, with exponents: `cm^2`, `m/s`; words that are none stand for themselves."""
        parts: list[str] = []
        words: list[str] = []
        while True:
            divides = self._is("/") and self._kind(1) in ("unit", "word")
            if divides:
                self._take()
            if self._kind() == "unit":
                name = self._take().text
                power = self._accept("^") and str(self._power())
                prefix = "/" if divides else "*" if parts else ""
                parts.append(prefix + _singular(name) + (f"^{power}" if power else ""))
            elif self._kind() == "word":
                words.append(self._take().text.lower())
            else:
                break
        exponent = {"square": "^2", "sq": "^2", "cubic": "^3"}.get(words[0] if words else "", "")
        if parts:
            return parts[0] + exponent + "".join(parts[1:]) if exponent else "".join(parts)
        return " ".join(words)

    def _power(self) -> int:
        braces = self._accept("{")
        token = self._take()
        if braces:
            self._expect("}")
        if token.kind != "number" or not token.text.isdigit() or len(token.text) > 1:
            raise Unreadable("a unit's exponent")
        return int(token.text)


def _singular(name: str) -> str:
    from_plural = {"inche": "inch", "feet": "foot"}
    single = name[:-1] if name.endswith("s") and len(name) > 2 else name
    return from_plural.get(single, single)


def _fraction(text: str) -> Fraction:
    mantissa, _, exponent = text.lower().partition("e")
    if exponent and abs(int(exponent)) > 4000:
        raise NoAnswer("an exponent beyond any answer")
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)


def _signed(node: Node, sign: Literal[1, -1]) -> Node:
    """The expression with `±` as plus or minus."""
    args = tuple(_signed(each, sign) for each in node.args)
    if node.op != "±":
        return Node(node.op, args, node.value)
    if len(args) == 1:
        return args[0] if sign == 1 else Node("neg", args)
    return Node("+" if sign == 1 else "-", args)


def _related(sides: list[Value], signs: list[str]) -> Value:
    if "!=" in signs:
        raise Unreadable("an inequation")
    if signs == ["in"]:
        return sides[1]
    if set(signs) == {"="}:
        return _equality(sides)
    return _interval(sides, signs)


def _equality(sides: list[Value]) -> Value:
    """`x = 3` names a value, `1/2 = 0.5` is its last side, anything else is an equation."""
    first, last = sides[0], sides[-1]
    if not isinstance(first, Quantity) or not isinstance(last, Quantity):
        return last if not isinstance(first, Quantity) else Named(_name_of(first.node), last)
    if first.node.op == "symbol" and first.node.value not in last.node.names:
        return Named(_name_of(first.node), last)
    if not last.node.names and _is_call(first.node):
        return Named(_name_of(first.node), last)
    if _is_call(first.node) and len(sides) == 2 and first.node.args[0].value not in last.node.names:
        return Named(_name_of(first.node), last)
    if not first.node.names:
        return last
    return Equation(first.node, last.node) if len(sides) == 2 else last


def _is_call(node: Node) -> bool:
    """`f(x)` and `AB`, which read as products of symbols."""
    return node.op == "*" and all(each.op == "symbol" or _is_call(each) for each in node.args)


def _name_of(node: Node) -> str:
    return str(node.value) if node.op == "symbol" else "".join(_name_of(each) for each in node.args)


def _interval(sides: list[Value], signs: list[str]) -> Value:
    """The interval of an inequality in one variable: `1 < x <= 2`, `x > 3`."""
    if any(not isinstance(each, Quantity) for each in sides) or not set(signs) <= {"<", "<=", ">", ">="}:
        raise Unreadable("a relation")
    if all(sign.startswith(">") for sign in signs):
        sides, signs = sides[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
    if not all(sign.startswith("<") for sign in signs):
        raise Unreadable("a relation")
    variable = [place for place, each in enumerate(sides) if isinstance(each, Quantity) and each.node.op == "symbol"
                and each.node.names]  # fmt: skip
    others = [each for place, each in enumerate(sides) if place not in variable]
    if len(variable) != 1 or any(isinstance(each, Quantity) and each.node.names for each in others):
        raise Unreadable("a relation")
    if len(sides) == 3 and variable == [1]:
        low, high = sides[0], sides[2]
        return Items("bracket", (low, high), ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]"))
    if len(sides) != 2:
        raise Unreadable("a relation")
    if variable == [0]:
        negative = Quantity(Node("neg", (INFINITY.node,)))
        return Items("bracket", (negative, sides[1]), "(" + (")" if signs[0] == "<" else "]"))
    return Items("bracket", (sides[0], INFINITY), ("(" if signs[0] == "<" else "[") + ")")

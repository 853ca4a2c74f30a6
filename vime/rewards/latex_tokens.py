"""Tokens of an answer, LaTeX or plain: an escape, a number, a word and a text command are one unit each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["number", "symbol", "function", "unit", "word", "mark"]

MOST_DIGITS = 4000
"""A longer literal is degenerate; Python itself refuses to read much longer ones."""


class Unreadable(Exception):
    """The answer uses something that this reader does not know."""


class NoAnswer(Exception):
    """The text is no answer to anything: two numbers in a row, or larger or deeper than any real answer."""


@dataclass(frozen=True, slots=True)
class Token:
    """`text` is the canonical spelling: a number without separators, a symbol's name, a unit's name, a mark."""

    kind: Kind
    text: str
    spaced: bool = False
    """White space stands before it."""


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


FUNCTIONS = _set("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt")
_GREEK = _set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar"
)
_DROPPED = _set(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle textstyle limits quad "
    "qquad middle thinspace nobreak hfill enspace"
)
_SPACING = frozenset(",;:! /~")
_MARKS = {
    "cdot": "*", "times": "*", "ast": "*", "div": "/", "pm": "±", "mp": "±", "le": "<=", "leq": "<=", "leqslant": "<=",
    "ge": ">=", "geq": ">=", "geqslant": ">=", "lt": "<", "gt": ">", "ne": "!=", "neq": "!=", "in": "in",
    "approx": "=", "simeq": "=", "cup": "cup", "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[", "rbrack": "]",
    "langle": "(", "rangle": ")", "lvert": "|", "rvert": "|", "vert": "|", "lfloor": "lfloor", "rfloor": "rfloor",
    "lceil": "lceil", "rceil": "rceil", "lor": "or", "vee": "or", "land": "or", "wedge": "or", "frac": "frac",
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "binom": "binom", "dbinom": "binom", "tbinom": "binom",
    "boxed": "group", "overline": "overline", "bar": "overline", "colon": ":", "\\": "row",
}  # fmt: skip
_TEXT = _set(
    "text textrm textbf textit textsf texttt textnormal mathrm mathbf mathit mathsf mathtt mbox hbox operatorname "
    "boldsymbol bm emph underline"
)
_SYMBOLS = {"infty": "infinity", "emptyset": "empty", "varnothing": "empty", "pi": "pi", "imath": "i", "circ": "degree"}
_SHORT_WORDS = frozenset(("no", "is", "of", "in", "to", "an", "by", "at", "on", "if", "it", "we", "he", "so", "or"))
_UNICODE = {
    "×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "−": "-", "–": "-", "±": "±", "≤": "<=", "≥": ">=", "≠": "!=",
    "∪": "cup", "∈": "in", "≈": "=",
}  # fmt: skip
UNITS: dict[str, tuple[str, str]] = {}
"""Unit as written: dimension and factor to the dimension's first unit (a number as text)."""
for _dimension, _units in {
    "length": "m 1,meter 1,metre 1,cm 1/100,centimeter 1/100,centimetre 1/100,mm 1/1000,millimeter 1/1000,km 1000,"
    "kilometer 1000,kilometre 1000,in 127/5000,inch 127/5000,inche 127/5000,ft 381/1250,feet 381/1250,foot 381/1250,"
    "yd 1143/1250,yard 1143/1250,mi 201168/125,mile 201168/125",
    "mass": "g 1,gram 1,kg 1000,kilogram 1000,mg 1/1000,milligram 1/1000",
    "time": "s 1,sec 1,second 1,min 60,minute 60,h 3600,hr 3600,hour 3600,day 86400,week 604800,ms 1/1000",
    "money": "dollar 1,usd 1,cent 1/100,buck 1",
    "euro": "euro 1,eur 1", "pound": "gbp 1", "yen": "yen 1", "rupee": "rupee 1",
    "volume": "l 1,liter 1,litre 1,ml 1/1000,milliliter 1/1000,millilitre 1/1000",
    "angle": "degree 1,deg 1",
    "radian": "rad 1,radian 1",
    "any": "unit 1",
}.items():  # fmt: skip
    for _entry in _units.split(","):
        _name, _factor = _entry.split()
        UNITS[_name] = (_dimension, _factor)

_GROUPED = r"\d{1,3}(?:(?:\{,\}|,\\!|\\,|\\!)\d{3})+(?!\d)"
_COMMAS = r"\d{1,3}(?:,\d{3})+(?!\d)"
_PLAIN = r"\d+"
_SCIENTIFIC = r"(?:[eE][+-]?\d+(?![\d.a-zA-Z]))?"
_NUMBER = re.compile(rf"(?:(?:{_GROUPED}|{_PLAIN})(?:(?:\.|\{{,\}})\d+|\.(?![.\d]))?|\.\d+){_SCIENTIFIC}")
_NUMBER_COMMAS = re.compile(
    rf"(?:(?:{_GROUPED}|{_COMMAS}|{_PLAIN})(?:(?:\.|\{{,\}})\d+|\.(?![.\d]))?|\.\d+){_SCIENTIFIC}"
)
_LETTERS = re.compile(r"[A-Za-z]+")
_UNIT_LETTER = re.compile(r"[mgshL](?=\s*$|\s*[.,;/$]|\^\{?[23]\}?\s*$)")
_CIRC = re.compile(r"\^\s*\{?\s*(?:\\circ|\\degree|°|∘)\s*\}?")
_SEPARATOR = re.compile(r"\{,\}|,\\!|\\,|\\!|,")
_SPACES = re.compile(r"\s+")


def tokenise(text: str, *, commas: bool) -> list[Token]:
    """The tokens. With `commas` a comma before three digits, outside of brackets, groups the digits of a number."""
    return _Lexer(text, commas).run()


class _Lexer:
    def __init__(self, text: str, commas: bool) -> None:
        self.text, self.commas = text, commas
        self.place, self.depth, self.spaced = 0, 0, False
        self.tokens: list[Token] = []
        self.dollars_pair = len(re.findall(r"(?<!\\)\$", text)) % 2 == 0
        """True where unescaped dollars delimit mathematics; a dollar without a partner is money."""

    def run(self) -> list[Token]:
        while self.place < len(self.text):
            self._one()
        return self.tokens

    def _add(self, kind: Kind, text: str) -> None:
        self.tokens.append(Token(kind, text, self.spaced))
        self.spaced = False

    def _one(self) -> None:
        text, place = self.text, self.place
        character = text[place]
        if character.isspace() or character == "~":
            self.place, self.spaced = place + 1, True
        elif character.isdigit() or (character == "." and text[place + 1 : place + 2].isdigit()):
            self._number()
        elif character == "\\":
            self._escape()
        elif found := _CIRC.match(text, place):
            self.place = found.end()
            self._add("unit", "degree")
        elif "A" <= character <= "z" and character.isalpha():
            self._letters()
        else:
            self._character(character)

    def _number(self) -> None:
        pattern = _NUMBER_COMMAS if self.commas and self.depth == 0 else _NUMBER
        found = pattern.match(self.text, self.place)
        if found is None:
            raise Unreadable(self.text[self.place])
        self.place = found.end()
        whole = found[0]
        # A group of other than three digits after a comma in braces is a decimal comma.
        whole = re.sub(r"\{,\}(?!\d{3}(?:\D|$))", ".", whole)
        whole = _SEPARATOR.sub("", whole)
        if not self.text.startswith(("\\overline", "\\bar"), self.place):
            whole = whole.rstrip(".")
        if len(whole) > MOST_DIGITS:
            raise NoAnswer(f"a number of {len(whole)} digits")
        self._add("number", whole)

    def _letters(self) -> None:
        found = _LETTERS.match(self.text, self.place)
        assert found is not None
        run = found[0]
        after_number = bool(self.tokens) and self.tokens[-1].kind == "number"
        if len(run) == 1 and self.spaced and after_number and _UNIT_LETTER.match(self.text, self.place):
            self.place += 1
            self._add("unit", run.lower())
            return
        self.place = found.end()
        self._run_of_letters(run)

    def _run_of_letters(self, run: str) -> None:
        lower = run.lower()
        if lower in FUNCTIONS:
            self._add("function", lower)
        elif lower in ("and", "or"):
            self._add("mark", "or")
        elif lower in ("pi", "infinity"):
            self._add("symbol", lower)
        elif lower in ("percent", "pct"):
            self._add("mark", "%")
        elif len(run) > 1 and unit_of(lower) is not None and self._unit_may_follow():
            self._add("unit", lower)
        elif len(run) >= 3 or lower in _SHORT_WORDS:
            self._add("word", run)
        else:
            for letter in run:
                self._add("symbol", letter)

    def _character(self, character: str) -> None:
        self.place += 1
        if character in "([":
            self.depth += 1
        elif character in ")]":
            self.depth -= 1
        if character in _UNICODE:
            self._add("mark", _UNICODE[character])
        elif character in "<>" and self.text[self.place : self.place + 1] == "=":
            self.place += 1
            self._add("mark", character + "=")
        elif character == "*" and self.text[self.place : self.place + 1] == "*":
            self.place += 1
            self._add("mark", "^")
        elif character in "+-*/^_=<>()[]{},;:!|%&'":
            self._add("mark", character)
        elif character == "°":
            self._add("unit", "degree")
        elif character in "π∞√∅θ":
            names = {"π": "pi", "∞": "infinity", "∅": "empty", "θ": "theta"}
            self._add("function", "sqrt") if character == "√" else self._add("symbol", names[character])
        elif character in "$€£":
            if character != "$" or not self.dollars_pair:
                self._add("mark", "currency")
        else:
            raise Unreadable(character)

    def _escape(self) -> None:
        found = _LETTERS.match(self.text, self.place + 1)
        if found is None:
            self._escaped_character()
            return
        name, self.place = found[0], found.end()
        if name in _DROPPED:
            self.spaced = self.spaced or name in ("quad", "qquad")
            self._null_delimiter(name)
        elif name in _TEXT:
            self._text(name)
        elif name in _MARKS:
            mark = _MARKS[name]
            self.depth += {"\\{": 1, "[": 1, "(": 1, "\\}": -1, "]": -1, ")": -1}.get(mark, 0)
            self._add("mark", mark)
        elif name in FUNCTIONS or name == "operatorname":
            self._add("function", name)
        elif name in ("degree", "circ"):
            self._add("unit", "degree")
        elif name in _SYMBOLS or name in _GREEK:
            self._add("symbol", _SYMBOLS.get(name, name))
        elif name in ("mathbb", "mathcal", "mathscr", "mathfrak", "vec", "hat", "tilde"):
            self._add("symbol", f"{name}:{self._argument()}")
        elif name in ("begin", "end"):
            environment = self._argument()
            if environment == "array" and name == "begin":
                self._argument()
            self.depth += 1 if name == "begin" else -1
            self._add("mark", f"{name}:{environment}")
        elif name in ("textdollar", "pounds", "euro"):
            self._add("mark", "currency")
        else:
            raise Unreadable("\\" + name)

    def _null_delimiter(self, name: str) -> None:
        """`\\right.` closes nothing."""
        if name in ("left", "right") and self.text[self.place : self.place + 1] == ".":
            self.place += 1

    def _escaped_character(self) -> None:
        character = self.text[self.place + 1 : self.place + 2]
        self.place += 2
        if character in _SPACING or not character:
            self.spaced = True
        elif character in "{}":
            self.depth += 1 if character == "{" else -1
            self._add("mark", "\\" + character)
        elif character == "%":
            self._add("mark", "%")
        elif character == "$":
            self._add("mark", "currency")
        elif character == "\\":
            self._add("mark", "row")
        elif character == "|":
            self._add("mark", "|")
        elif character in "()[]":
            pass  # delimiters of mathematics
        else:
            raise Unreadable("\\" + character)

    def _argument(self) -> str:
        """The text in the braces that follow, or the next character."""
        found = _SPACES.match(self.text, self.place)
        start = found.end() if found else self.place
        if self.text[start : start + 1] != "{":
            self.place = start + 1
            return self.text[start : start + 1]
        depth, place = 0, start
        while place < len(self.text):
            character = self.text[place]
            if character == "\\":
                place += 1
            else:
                depth += (character == "{") - (character == "}")
            place += 1
            if depth == 0:
                self.place = place
                return self.text[start + 1 : place - 1]
        raise Unreadable("braces that do not close")

    def _text(self, name: str) -> None:
        """A text command's content: mathematics where it is as short as a symbol, else words and units."""
        content = self._argument()
        words = _SPACES.sub(" ", content.replace("~", " ").replace("\\ ", " ")).strip(" .,")
        lower = words.lower()
        self.spaced = self.spaced or content[:1].isspace() or content[:1] == "~"
        if not words:
            self.spaced = True
        elif name == "operatorname" and lower in FUNCTIONS:
            self._add("function", lower)
        elif re.fullmatch(r"[0-9.,/+()%:$\\ -]*|\(?[A-Za-z]\)?", words) or any(mark in words for mark in "^={}_"):
            inner = _Lexer(words, self.commas)
            after_number = bool(self.tokens) and self.tokens[-1].kind == "number"
            if len(words) == 1 and after_number and (words in "mgsLhl"):
                self._add("unit", lower)
            else:
                self.tokens += inner.run()
        else:
            self._words(words)

    def _unit_may_follow(self) -> bool:
        last = self.tokens[-1] if self.tokens else None
        return last is not None and (last.kind in ("number", "unit", "symbol") or last.text in ("/", ")", "}"))

    def _words(self, words: str) -> None:
        for part in re.findall(r"[A-Za-z'’-]+|\d+|[^\sA-Za-z\d]", words):
            lower = part.lower()
            if lower in ("and", "or"):
                self._add("mark", "or")
            elif lower in ("percent", "pct"):
                self._add("mark", "%")
            elif part == "/" or lower == "per":
                self._add("mark", "/")
            elif part.isdigit():
                self._add("number", part)
            elif unit_of(lower) is not None and self._unit_may_follow():
                self._add("unit", lower)
            elif part in ",;":
                self._add("mark", part)
            else:
                self._add("word", part)


def unit_of(name: str) -> tuple[str, str] | None:
    """Dimension and factor of a unit in singular or plural; None for what is no unit."""
    return UNITS.get(name) or (UNITS.get(name[:-1]) if name.endswith("s") and len(name) > 2 else None)

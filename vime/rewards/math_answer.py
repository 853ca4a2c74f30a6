"""Rewards that compare a final mathematical answer with the label."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from math_verify import parse, verify
from sympy import Basic

from vime.rewards.answer_numbers import Node
from vime.rewards.answer_reader import readings
from vime.rewards.answer_values import Items, Named, Quantity, Value, Words, equal
from vime.rewards.extract import (
    ANSWER_MARKERS,
    BadLabel,
    after_hashes,
    candidates,
    final_part,
    last_boxed,
    without_emphasis,
)
from vime.rewards.latex_tokens import NoAnswer, Unreadable
from vime.samples import Sample

CUT_OFF = "grade_cut_off_thinking"
"""Key of a row's metadata: true gives credit for an answer in thinking that never ended."""
_DAPO_TAIL = 300
_DAPO_ANSWER = re.compile(r"answer[\s*_`]*:\s*([^\n]+)", re.IGNORECASE)
_MOST_FOR_LIBRARY = 2000
_TOWER = re.compile(r"(?:\^\s*\{?\s*\(?[^\s{}()^]*\s*){3}|\d{5,}\s*\)?\s*!|\^\s*\{?\s*\d{5,}|\^\s*\{?\s*\(?\s*\d+\s*\^")
_RUN = re.compile(r"(.)\1{59}|(?:[\d\s]+[-+*/]){60}", re.DOTALL)
_SPACE = re.compile(r"(?<![\d\\A-Za-z])\s+(?=\S)|\s+(?![\dA-Za-z])")
_ARITHMETIC = frozenset(("+", "-", "*", "neg", "number"))
_RELATIVE = 1e-9


def prepare() -> None:
    """Have the parser load its grammar, which takes seconds, before the first answer's time runs."""
    _by_library("1+x", "x+1")


def deepscaler(sample: Sample) -> float:
    """1 where the boxed answer after the thinking is right, else 0.

    A response that never ends its thinking (`</think>`, or `###Response`) has not answered.
    """
    return float(_matches(_after_thinking(sample), sample))


def _after_thinking(sample: Sample) -> str | None:
    for marker in ANSWER_MARKERS:
        _, found, final = sample.response.rpartition(marker)
        if found:
            return last_boxed(final)
    return last_boxed(sample.response) if sample.metadata.get(CUT_OFF) else None


def _matches(answer: str | None, sample: Sample) -> bool:
    label = label_of(sample)
    return answer is not None and same(answer, label)


def math(sample: Sample) -> float:
    """1 where the response's answer is right, boxed or not, else 0."""
    final, label = final_part(sample.response, cut_off=bool(sample.metadata.get(CUT_OFF))), label_of(sample)
    boxed = last_boxed(final)
    if boxed is not None:
        return float(same(boxed, label))
    return float(_unboxed_is(final, label))


def dapo(sample: Sample) -> float:
    """1 where the last `Answer: …` near the response's end is right, else -1."""
    found = _DAPO_ANSWER.findall(sample.response[-_DAPO_TAIL:])
    label = label_of(sample)
    if not found:
        return -1.0
    answer = without_emphasis(found[-1])
    boxed = last_boxed(answer)
    return 1.0 if same(answer if boxed is None else boxed, label) else -1.0


def label_of(sample: Sample) -> str:
    """The right answer as text, out of its box or from behind its `####`."""
    if sample.label is None:
        raise BadLabel("the sample has no label to compare with: check --label-key")
    text = str(sample.label)
    boxed = last_boxed(text)
    return boxed if boxed is not None else after_hashes(text) or text


def _unboxed_is(final: str, label: str) -> bool:
    """The first part of a text that reads as an answer decides; of prose without one, math-verify's finding."""
    wanted = _read(label)
    for candidate in candidates(final):
        if not candidate:
            continue
        if candidate == label.strip():
            return True
        found = _read(candidate)
        if found and (not _is_prose(found) or any(isinstance(each, Words) for each in wanted)):
            return same(candidate, label)
    return not _is_large(final[-_MOST_FOR_LIBRARY:]) and _by_library(final[-_MOST_FOR_LIBRARY:], label)


def _is_prose(found: list[Value]) -> bool:
    return any(
        isinstance(each, Words) or (isinstance(each, Named) and " " in each.name) or _has_loose_words(each)
        for each in found
    )


def _has_loose_words(value: Value) -> bool:
    """A sentence reads as a list of words and quantities with words for units."""
    if isinstance(value, Quantity):
        return len(value.unit.split()) > 2
    return isinstance(value, Items) and any(
        isinstance(each, Words) or _has_loose_words(each) for each in value.elements
    )


def same(answer: str, label: str) -> bool:
    """True where two answers mean the same: equal text, or equal values; math-verify reads what vime does not.

    An answer that nobody can read is wrong, never an error.
    """
    answer, label = without_emphasis(answer), without_emphasis(label)
    if not label or not answer:
        return False
    if answer == label or _squeezed(answer) == _squeezed(label):
        return True
    try:
        given, wanted = list(readings(answer)), list(readings(label))
        return any(equal(found, right) and not _is_undone(found, right) for found in given for right in wanted)
    except NoAnswer:
        return False
    except Unreadable:
        return not (_is_large(answer) or _is_large(label)) and _by_library(answer, label)


def _read(text: str) -> list[Value]:
    """All readings of a text; none where vime cannot read it."""
    try:
        return list(readings(text))
    except (Unreadable, NoAnswer):
        return []


def _squeezed(text: str) -> str:
    """The text without the spaces that part nothing: those between digits and between letters stay."""
    return _SPACE.sub("", text)


def _is_undone(answer: Value, label: Value) -> bool:
    """True for arithmetic that nobody has done: repeating `5+7` is no answer where 12 is asked for."""
    answer = answer.value if isinstance(answer, Named) else answer
    label = label.value if isinstance(label, Named) else label
    if not (isinstance(answer, Quantity) and isinstance(label, Quantity)):
        return False
    return _is_number(label.node) and not _is_number(answer.node) and answer.node.ops <= _ARITHMETIC


def _is_number(node: Node) -> bool:
    return node.op == "number" or (node.op == "neg" and _is_number(node.args[0]))


def _is_large(text: str) -> bool:
    """True for what would keep math-verify busy for ever or fill the memory."""
    deep = text.count("{") > 200 or text.count("(") > 100
    return len(text) > _MOST_FOR_LIBRARY or deep or bool(_RUN.search(text) or _TOWER.search(text))


def _by_library(answer: str, label: str) -> bool:
    """math-verify's verdict, without those of its equalities that numbers contradict."""
    try:
        # The pool sets the time limits: math-verify's own use the same alarm.
        gold, given = _parsed(label), _parsed(answer)
        return any(
            verify([right], [found], timeout_seconds=0) and not _differ(right, found)
            for right in _of_kind(gold)
            for found in _of_kind(given)
        )
    except (ArithmeticError, AttributeError, IndexError, KeyError, LookupError, NotImplementedError, RecursionError,
            TypeError, ValueError):  # fmt: skip
        return False


def _of_kind(parsed: list[Any]) -> Iterator[Any]:
    """The mathematics that was found; its text only where there is none."""
    found = [each for each in parsed if not isinstance(each, str)]
    yield from found or parsed


def _differ(right: Any, found: Any) -> bool:
    """True where both are constants that differ relatively; math-verify compares absolutely."""
    if not (isinstance(right, Basic) and isinstance(found, Basic)) or right.free_symbols or found.free_symbols:
        return False
    try:
        first, second = complex(right.evalf(30)), complex(found.evalf(30))
    except (TypeError, ValueError, AttributeError):
        return False
    return abs(first - second) > _RELATIVE * max(abs(first), abs(second))


def _parsed(text: str) -> list[Any]:
    """math-verify's reading: the answer in prose, anything else whole as LaTeX."""
    marked = any(mark in text for mark in ("\\boxed", "$", "\\(", "\\["))
    if marked or _PROSE.search(text):
        return parse(text, parsing_timeout=0)
    return parse(f"${text}$", parsing_timeout=0) or parse(text, parsing_timeout=0)


_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}\s")

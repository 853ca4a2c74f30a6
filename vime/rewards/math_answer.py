"""Rewards that compare a final mathematical answer with the label."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from math_verify import parse, verify

from vime.samples import Sample

_MARKERS = ("</think>", "###Response")
_DAPO_TAIL = 300
_DAPO_ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{?(\d+)\}?\{?(\d+)\}?")
_LITERAL = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(/\d+)?%?")
_SUM = re.compile(r"[\d\s.+\-*()]+")
_OPERATOR = re.compile(r"[\d)]\s*[+\-*]")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}\s")
_DRESSING = re.compile(
    r"\\(?:left|right|!|,|;|:|displaystyle)|\$|\\[()\[\]]|\\text\s*\{[^{}]*\}|\\mathrm\s*\{[^{}]*\}|\s+"
)


def prepare() -> None:
    """Have the parser load its grammar, which takes seconds, before the first answer's time runs."""
    same("1+x", "x+1")


def deepscaler(sample: Sample) -> float:
    """1 where the boxed answer after the thinking is right, else 0.

    A response that never ends its thinking (`</think>`, or `###Response`) has not answered.
    """
    for marker in _MARKERS:
        _, found, final = sample.response.rpartition(marker)
        if found:
            answer = last_boxed(final)
            return 0.0 if answer is None else float(same(answer, label_of(sample)))
    return 0.0


def math(sample: Sample) -> float:
    """1 where the response's answer is right, boxed or not, else 0; graded by math-verify."""
    final = sample.response.rpartition("</think>")[2]
    boxed = last_boxed(final)
    return float(same(final if boxed is None else boxed, label_of(sample)))


def dapo(sample: Sample) -> float:
    """1 where the last `Answer: …` near the response's end is right, else -1."""
    found = _DAPO_ANSWER.findall(sample.response[-_DAPO_TAIL:])
    if not found:
        return -1.0
    answer = found[-1].strip().rstrip(".")
    boxed = last_boxed(answer)
    return 1.0 if same(answer if boxed is None else boxed, label_of(sample)) else -1.0


def label_of(sample: Sample) -> str:
    """The right answer as text, out of its box if it is in one."""
    if sample.label is None:
        raise ValueError("the sample has no label to compare with: check --label-key")
    text = str(sample.label)
    boxed = last_boxed(text)
    return text if boxed is None else boxed


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{…}` with its braces balanced; None where there is none, or it never closes."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    opening = text.index("{", start)
    depth = 0
    for place in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[opening + 1 : place]
    return None


def same(answer: str, label: str) -> bool:
    """Whether two answers mean the same: equal text, equal numbers, or equal for math-verify."""
    plain_answer, plain_label = _plain(answer), _plain(label)
    if plain_answer == plain_label:
        return bool(plain_label)
    label_number, answer_number = number(plain_label), number(plain_answer)
    if label_number is not None and answer_number is not None:
        return label_number == answer_number
    if label_number is not None and _is_sum(plain_answer):
        return False
    return _verify(answer, label, exact_number=label_number is not None)


def number(text: str) -> Fraction | None:
    """The value of a number, decimal, fraction or percentage; None for anything else."""
    text = _FRACTION.sub(r"\1\2/\3", text)
    if not _LITERAL.fullmatch(text):
        return None
    percent = text.endswith("%")
    top, _, bottom = text.rstrip("%").partition("/")
    if bottom and not int(bottom):
        return None
    value = Fraction(top) / (int(bottom) if bottom else 1)
    return value / 100 if percent else value


def _plain(text: str) -> str:
    """The text without spaces, dollars, thousands separators and other dressing."""
    text = _DRESSING.sub("", text.replace("\\%", "%").replace("{,}", ","))
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return text.rstrip(".")


def _is_sum(text: str) -> bool:
    """Whether the text is arithmetic that nobody has done: repeating `5+7` is no answer to it."""
    return bool(_SUM.fullmatch(text) and _OPERATOR.search(text))


def _verify(answer: str, label: str, *, exact_number: bool) -> bool:
    # The pool sets the time limits: math-verify's own use the same alarm.
    gold = _parsed(label)
    given = _parsed(answer)
    if not gold or not given:
        return False
    extracted = given[-1] if isinstance(given[-1], str) else ""
    if exact_number and _is_sum(_plain(extracted)):
        return False
    return bool(verify(gold, given, timeout_seconds=0))


def _parsed(text: str) -> list[Any]:
    """math-verify's reading: of prose the answer in it, of anything else the whole as LaTeX."""
    marked = any(mark in text for mark in ("\\boxed", "$", "\\(", "\\["))
    if marked or _PROSE.search(text):
        return parse(text, parsing_timeout=0)
    return parse(f"${text}$", parsing_timeout=0) or parse(text, parsing_timeout=0)

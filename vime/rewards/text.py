"""Rewards that compare words and choices."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from vime.rewards.extract import BadLabel, chosen_letter, final_part
from vime.samples import Sample

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def f1(sample: Sample) -> float:
    """Harmonic mean of precision and recall of words, without case, punctuation and articles (the SQuAD measure).

    The label is one reference or a list of them, of which the best counts.
    """
    references = sample.label if isinstance(sample.label, list) else [sample.label]
    answer = _words(final_part(sample.response))
    return max((_f1(answer, _words(str(reference))) for reference in references), default=0.0)


def _f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    if not answer or not reference:
        return float(list(answer) == list(reference))
    common = sum((Counter(answer) & Counter(reference)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(answer), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def gpqa(sample: Sample) -> float:
    """1 where the response chooses the right letter, else 0.

    The label is a letter, a number from 0, or the text of one of `metadata["choices"]`.
    """
    choices = [str(choice) for choice in sample.metadata.get("choices", ())]
    wanted = _letter(sample.label, choices)
    return float(chosen_letter(final_part(sample.response), choices) == wanted)


def _letter(label: Any, choices: Sequence[str]) -> str:
    text = str(label).strip()
    if text in choices:
        return string.ascii_uppercase[choices.index(text)]
    if isinstance(label, int) or text.isdecimal():
        return string.ascii_uppercase[int(text)]
    bare = text.strip("().")
    if len(bare) != 1 or not bare.isalpha():
        raise BadLabel(f"label {label!r} is neither a letter, nor a number, nor one of the choices")
    return bare.upper()

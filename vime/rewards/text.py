"""Rewards that compare words and choices."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from vime.samples import Sample

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CHOICE_PATTERNS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\\boxed\s*\{\s*(?:\\text\s*\{)?\s*\(?([A-Z])\)?\s*\}",
        r"answer\s*(?:is|:|=)?\s*[:=]?\s*\**\s*\$?\(?([A-Z])\)?(?![A-Za-z])",
        r"(?:choice|option)\s*(?:is|:)?\s*\(?([A-Z])\)?(?![A-Za-z])",
    )
)
_LAST_LETTER = re.compile(r"(?<![A-Za-z])\(?([A-Z])\)?\s*[.!]?\s*$")


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
    return float(chosen_letter(final_part(sample.response)) == wanted)


def chosen_letter(text: str) -> str | None:
    """The last letter that the text names as its answer; boxed before `answer: C` before a bare letter at the end."""
    for pattern in _CHOICE_PATTERNS:
        if found := pattern.findall(text):
            return found[-1].upper()
    last = _LAST_LETTER.search(text.strip())
    return last.group(1) if last else None


def _letter(label: Any, choices: Sequence[str]) -> str:
    text = str(label).strip()
    if text in choices:
        return string.ascii_uppercase[choices.index(text)]
    if isinstance(label, int) or text.isdecimal():
        return string.ascii_uppercase[int(text)]
    bare = text.strip("().")
    if len(bare) != 1 or not bare.isalpha():
        raise ValueError(f"label {label!r} is neither a letter, nor a number, nor one of the choices")
    return bare.upper()


def final_part(response: str) -> str:
    """What follows the thinking; all of it where there is none."""
    return response.rpartition("</think>")[2]

"""The part of a response that is its answer: thinking is left out, boxes, phrases and choices are found."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_BOX = re.compile(r"\\f?boxed\s*(?=\{)|\\boxed\s+(?P<bare>[^\s{}$\\]+)")
_OPEN, _CLOSE = "<think>", "</think>"
ANSWER_MARKERS = ("</think>", "###Response")
"""Ends of the thinking, behind which `deepscaler` looks for the box."""
_EMPHASIS = re.compile(r"^[\s*_`]+|[\s*_`]+$")
_PHRASE = re.compile(
    r"(?:answer|result|solution|total)s?(?:[*_`\s]*(?:is|are|=|:|equals))+[*_`\s:]*(?P<rest>[^\n]+)", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[;,](?=\s+(?:which|since|because|as|so)\b)")
_MATHS = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$([^$\n]+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*")
_TAIL = 4000
"""Characters at a response's end in which an answer that is not boxed is looked for."""


def final_part(response: str, *, cut_off: bool = False) -> str:
    """The response without its thinking; what is thought after a `<think>` that never closes, only with `cut_off`.

    The part behind the last block of thinking comes last. Text before the first block stays.
    """
    before, opened, _ = response.partition(_OPEN)
    _, closed, after = response.rpartition(_CLOSE)
    if not closed:
        return response if cut_off or not opened else before
    if _OPEN in after:
        last, _, _ = after.partition(_OPEN)
        after = after if cut_off else last
    if not opened or len(before) > len(response) - len(after):
        return after
    return after if after.strip() else before


class BadLabel(ValueError):
    """The label cannot be compared with; any other error of a built-in reward means a wrong answer."""


def has_answer(reward: str, response: str) -> bool:
    """True where a response has something that the built-in reward can grade."""
    if reward == "deepscaler":
        return any(marker in response for marker in ANSWER_MARKERS)
    if reward == "dapo":
        return "answer" in response.lower()
    return bool(final_part(response).strip())


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{…}` that closes; None where there is none. An escaped brace is no brace."""
    found: tuple[int, str] | None = None
    openings: list[tuple[int, int]] = []
    boxes = {match.end(): match.start() for match in _BOX.finditer(text) if match["bare"] is None}
    bare = [(match.start(), match["bare"]) for match in _BOX.finditer(text) if match["bare"] is not None]
    place = 0
    while place < len(text):
        character = text[place]
        if character == "\\":
            place += 2 if place not in boxes else 1
            continue
        if character == "{":
            openings.append((place, boxes.get(place, -1)))
        elif character == "}" and openings:
            opening, box = openings.pop()
            if box >= 0 and (found is None or box > found[0]):
                found = box, text[opening + 1 : place]
        place += 1
    if bare and (found is None or bare[-1][0] > found[0]):
        return bare[-1][1].rstrip(".,;")
    return found[1] if found else None


def after_hashes(text: str) -> str | None:
    """Text after the last `####` on its line, as in GSM8K; None without one."""
    _, found, rest = text.rpartition("####")
    if not found or not rest.strip():
        return None
    return rest.strip().splitlines()[0].strip()


def without_emphasis(text: str) -> str:
    """The text without the markdown marks around it, and without its full stop."""
    before = ""
    while before != text:
        before = text
        text = _EMPHASIS.sub("", text)
        text = text.removesuffix(".") if not text.endswith("..") else text
        if text.endswith(":"):
            text = text[:-1]
    return text


def candidates(text: str) -> Iterator[str]:
    """Answers of a text without a box, the likeliest first; the whole text only where it is no prose."""
    if (hashes := after_hashes(text)) is not None:
        yield without_emphasis(hashes)
    text = text[-_TAIL:]
    if phrases := list(_PHRASE.finditer(text)):
        rest = phrases[-1]["rest"]
        yield without_emphasis(rest)
        if end := _SENTENCE_END.search(rest):
            yield without_emphasis(rest[: end.start()])
    yield without_emphasis(text)
    lines = [line for line in text.splitlines() if line.strip()]
    for found in (_MATHS.findall(text), _BOLD.findall(lines[-1]) if lines else []):
        if found:
            last = found[-1]
            yield without_emphasis(last if isinstance(last, str) else next(filter(None, last)))
    if len(lines) > 1:
        yield without_emphasis(lines[-1])


_LETTER = r"(?P<letter>[A-Z])"
_AFTER_LETTER = r"(?=\s*$|\s*[)\].:,;}*_$\n!]|\s+(?:because|since|as|and|is|with|which|for|due|by|\(|-|–|—)|\s*\\\))"
_NAMES = r"(?i:answer|choice|option)s?"
_IS = r"(?:\s*(?i:is|are|:|=|would be|must be|should be))*[\s:*_`$\"']*(?:(?i:option|choice)\s*)?"
_OPENING = r"(?:\\\(|\\text(?:bf)?\{|\\mathbf\{|\\mathrm\{|\(|\[)*"
_CHOSEN = tuple(
    re.compile(pattern)
    for pattern in (
        rf"{_NAMES}{_IS}{_OPENING}{_LETTER}{_AFTER_LETTER}",
        rf"{_NAMES}{_IS}[(\[](?P<letter>[A-Za-z])[)\]]",
        rf"\*\*\s*[(\[]?{_LETTER}(?:[)\].:]?\s*|[)\].:]\s[^*\n]*)\*\*",
        rf"(?:^|\n)\s*[(\[]?{_LETTER}[)\]](?:\s[^\n]*)?\s*$",
        rf"(?:^|[^A-Za-z'])\(?{_LETTER}\)?\s*[.!]?\s*$",
    )
)
"""Ways to name a choice, the clearest first."""
_WRAPPED = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox|bf)\s*\{([^{}]*)\}")
_BOXED_LETTER = re.compile(r"\s*[(\[]?\s*(?P<letter>[A-Za-z])\s*(?:$|[)\].:,](?:\s|$|[^A-Za-z0-9]|.*))")


def chosen_letter(text: str, choices: Sequence[str] = ()) -> str | None:
    """The letter that a text chooses: in its last box, else as `answer: C`, in bold, or at the end.

    A choice that is written out instead of its letter counts too. An article is no choice.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return _letter_of(boxed, choices)
    for pattern in _CHOSEN:
        if found := list(pattern.finditer(text.strip())):
            return found[-1]["letter"].upper()
    for candidate in candidates(text):
        if letter := _written_out(candidate, choices):
            return letter
    return None


def _letter_of(boxed: str, choices: Sequence[str]) -> str | None:
    plain = without_emphasis(_WRAPPED.sub(r"\1", boxed).replace("$", "").replace("\\ ", " ").replace("~", " ").strip())
    if letter := _written_out(plain, choices):
        return letter
    found = _BOXED_LETTER.fullmatch(plain)
    if found:
        return found["letter"].upper()
    # `C 5 meters`: a letter with words after it, of which `A` may be an article.
    found = re.match(r"(?P<letter>[B-H])\s", plain)
    return found["letter"] if found else None


def _written_out(text: str, choices: Sequence[str]) -> str | None:
    wanted = _folded(text)
    matching = [place for place, choice in enumerate(choices) if wanted and _folded(choice) == wanted]
    return chr(ord("A") + matching[0]) if len(matching) == 1 else None


def _folded(text: str) -> str:
    return " ".join(text.casefold().strip(" .").split())

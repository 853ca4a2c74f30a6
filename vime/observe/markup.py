"""HTML of the report in small pieces. Every text goes through `escape`; what returns is safe to put into a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape as _escape
from typing import Any

SHOWN_CHARACTERS = 6000


def escape(value: Any) -> str:
    """Text that a browser shows as it stands; characters that no page may hold, or that turn text around, as codes."""
    text = "" if value is None else str(value)
    return _escape("".join(c if _plain(c) else f"\\u{ord(c):04x}" for c in text))


def _plain(character: str) -> bool:
    code = ord(character)
    if code < 32 or 0x7F <= code < 0xA0:
        return character in "\n\t"
    # Directional overrides and isolates would show a text as another one; surrogates are no characters.
    return not (0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069 or 0xD800 <= code <= 0xDFFF)


def table(rows: Sequence[Mapping[str, Any]], *, numbers: Sequence[str] = (), caption: str = "") -> str:
    """A table with the keys of the first row as its head; empty without rows."""
    if not rows:
        return ""
    heads = list(rows[0])

    def kind(head: str) -> str:
        return ' class="num"' if head in numbers else ' class="time"' if head == "time" else ""

    head = "".join(f'<th scope="col"{kind(h)}>{escape(h)}</th>' for h in heads)
    body = "".join(f"<tr>{''.join(f'<td{kind(h)}>{escape(row.get(h))}</td>' for h in heads)}</tr>" for row in rows)
    said = f"<caption>{escape(caption)}</caption>" if caption else ""
    # A region that scrolls can be reached by keyboard.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption or ", ".join(heads))}">'
        f"<table>{said}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def facts(values: Mapping[str, Any]) -> str:
    """Names and values below each other; those without a value are left out."""
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in values.items() if v not in (None, ""))
    return f'<dl class="facts">{rows}</dl>'


def cards(values: Sequence[tuple[str, str, str]]) -> str:
    """(name, value, more) as cards."""
    return '<div class="cards">' + "".join(
        f'<div class="card"><span class="name">{escape(name)}</span><b>{escape(value)}</b>'
        f'<span class="more">{escape(more)}</span></div>'
        for name, value, more in values
    ) + "</div>"  # fmt: skip


def pre(text: Any, label: str) -> str:
    """A block of text as it stands, which scrolls, so it can be focused."""
    return f'<pre tabindex="0" aria-label="{escape(label)}">{escape(text)}</pre>'


def details(summary: str, body: str) -> str:
    """A part that is folded."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def shortened(text: Any, most: int = SHOWN_CHARACTERS) -> str:
    """The text, its middle left out where it is long."""
    whole = "" if text is None else str(text)
    if len(whole) <= most:
        return whole
    return f"{whole[: most // 2]}\n… {len(whole) - most} characters left out …\n{whole[-most // 2 :]}"

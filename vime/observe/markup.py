"""Pieces of HTML for the report. Every text is escaped; the results are safe to put into a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape as _escape
from typing import Any

from vime.system.text import visible

SHOWN_CHARACTERS = 6000


def escape(value: Any) -> str:
    """The visible text of a value, escaped for HTML."""
    return _escape(visible(value))


def table(rows: Sequence[Mapping[str, Any]], *, numbers: Sequence[str] = (), caption: str = "") -> str:
    """A table with the keys of the first row as its head. Empty without rows."""
    if not rows:
        return ""
    heads = list(rows[0])

    def kind(head: str) -> str:
        return ' class="num"' if head in numbers else ' class="time"' if head == "time" else ""

    head = "".join(f'<th scope="col"{kind(h)}>{escape(h)}</th>' for h in heads)
    body = "".join(f"<tr>{''.join(f'<td{kind(h)}>{escape(row.get(h))}</td>' for h in heads)}</tr>" for row in rows)
    said = f"<caption>{escape(caption)}</caption>" if caption else ""
    # A scrolling region must be reachable by keyboard.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption or ", ".join(heads))}">'
        f"<table>{said}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def facts(values: Mapping[str, Any]) -> str:
    """A list of names and values; empty values are left out."""
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in values.items() if v not in (None, ""))
    return f'<dl class="facts">{rows}</dl>'


def cards(values: Sequence[tuple[str, str, str]]) -> str:
    """Cards of (name, value, more)."""
    return '<div class="cards">' + "".join(
        f'<div class="card"><span class="name">{escape(name)}</span><b>{escape(value)}</b>'
        f'<span class="more">{escape(more)}</span></div>'
        for name, value, more in values
    ) + "</div>"  # fmt: skip


def pre(text: Any, label: str) -> str:
    """A scrolling, focusable block of preformatted text."""
    return f'<pre tabindex="0" aria-label="{escape(label)}">{escape(text)}</pre>'


def details(summary: str, body: str) -> str:
    """A folded part."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def shortened(text: Any, most: int = SHOWN_CHARACTERS) -> str:
    """The text, with the middle left out if it is longer than `most` characters."""
    whole = "" if text is None else str(text)
    if len(whole) <= most:
        return whole
    return f"{whole[: most // 2]}\n… {len(whole) - most} characters left out …\n{whole[-most // 2 :]}"

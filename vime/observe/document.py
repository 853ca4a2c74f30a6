"""The frame of every page that vime writes: head with style and security policy, title, sections, footer."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from importlib.resources import files

from vime.observe.browse import policy
from vime.observe.markup import escape
from vime.planning.svg import STYLE as MAP_STYLE

STYLE = files("vime.observe").joinpath("report.css").read_text(encoding="utf-8")


def document(title: str, badge: str, subtitle: str, sections: Mapping[str, str], footer: str) -> str:
    """One self-contained HTML page. `title` and `footer` are text; badge, subtitle and bodies of sections are HTML.

    Sections without a body are left out.
    """
    present = {name: body for name, body in sections.items() if body}
    links = "".join(f'<li><a href="#{name.lower()}">{name}</a></li>' for name in present)
    body = "".join(
        f'<section id="{n.lower()}" aria-labelledby="h-{n.lower()}"><h2 id="h-{n.lower()}">{n}</h2>{b}</section>'
        for n, b in present.items()
    )
    first = next(iter(present), "").lower()
    name = escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy())}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<style>{STYLE}{MAP_STYLE}</style></head><body><a class="skip" href="#{first}">To the {first}</a>'
        f'<div class="wrap"><header class="top"><div class="title"><h1>{name}</h1>{badge}</div>{subtitle}</header>'
        f'<nav class="sections" aria-label="Sections"><ul>{links}</ul></nav><main>{body}</main>'
        f"<footer>Written by vime on {time_text(datetime.datetime.now().timestamp())}. {escape(footer)}</footer>"
        "</div></body></html>"
    )


def time_text(seconds: float) -> str:
    """Local date and time of Unix seconds."""
    return datetime.datetime.fromtimestamp(seconds).isoformat(" ", "seconds")

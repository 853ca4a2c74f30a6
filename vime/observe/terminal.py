"""Plain text of sections and tables, drawn with rich on a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vime.system.text import visible

_GAP = re.compile(r" {2,}")


def print_sections(text: str, console: Console | None = None) -> None:
    """Print a text as `vime.planning.show` makes it: titles stand out, and blocks of columns become tables.

    A block whose lines do not all have the same number of columns is printed as it is. Control characters are shown.
    """
    console = console or Console(highlight=False)
    for block in visible(text).rstrip("\n").split("\n\n"):
        for title, lines in _parts(block.split("\n")):
            if title:
                console.print(Text(title, style="bold cyan"))
            rows = [_GAP.split(line.strip()) for line in lines]
            if len(rows) > 1 and len(rows[0]) > 1 and len({len(row) for row in rows}) == 1:
                console.print(_table(rows))
            else:
                for line in lines:
                    console.print(Text(line), soft_wrap=True)
        console.print()


def _parts(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Titles, which are not indented, each with the lines below it."""
    title, below = "", []
    for line in lines:
        if line.startswith(" "):
            below.append(line)
            continue
        if title or below:
            yield title, below
        title, below = line, []
    yield title, below


def _table(rows: list[list[str]]) -> Table:
    """The first row is the head, unless the rows are pairs of a name and a value."""
    pairs = len(rows[0]) == 2
    table = Table(box=None, padding=(0, 2), show_header=not pairs, header_style="dim")
    for number, name in enumerate(rows[0]):
        numeric = all(row[number].replace(".", "").isdigit() for row in rows[1:])
        style = "dim" if pairs and not number else ""
        table.add_column(
            Text("" if pairs else name), justify="right" if numeric else "left", overflow="fold", style=style
        )
    for row in rows if pairs else rows[1:]:
        table.add_row(*map(Text, row))
    return table

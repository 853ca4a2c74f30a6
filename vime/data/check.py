"""A look at the prompt and evaluation sets of a recipe before it is queued; imports neither torch nor ray nor vllm."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from vime.data.files import MissingReader, Row, read_rows, shards
from vime.data.rows import Columns, read_cells
from vime.errors import BadInput
from vime.recipe.prompt_sources import PromptSource, all_sources
from vime.recipe.schema import Recipe

FIRST_ROWS = 32
"""Rows of every file that are looked at in any case."""
STRIDE = 997
"""Distance of the later rows that are looked at."""
MOST_BYTES = 8 * 2**20
"""Larger files are not read beyond their first rows, so that a dry run stays quick."""

T = TypeVar("T")


def check_prompt_data(recipe: Recipe, *, required: bool = True) -> list[str]:
    """Notes about the recipe's prompt and evaluation sets.

    Encoding, JSON, columns, labels and messages of the first rows and of some later ones are checked. Raises BadInput
    with file, row and column for one that training would refuse, and for a missing set where sets are `required`.
    """
    columns = Columns.of(recipe)
    return [
        note
        for source in all_sources(recipe)
        if required or _is_here(source)
        for note in _check(source, columns, recipe)
    ]


def _is_here(source: PromptSource) -> bool:
    """True for a file or folder, and for a split of a folder that is there."""
    path = Path(source.path)
    return path.exists() or (path.suffix == "" and path.parent.is_dir())


def _check(source: PromptSource, columns: Columns, recipe: Recipe) -> Iterator[str]:
    rows = 0
    if not _is_here(source):
        raise BadInput(f"{source.flag}: there is no file {source.path}")
    try:
        for file in shards(Path(source.path)):
            for row in _looked_at(file):
                rows += 1
                cells = read_cells(row, columns)
                if not isinstance(cells.prompt, str) and not recipe.rollout.apply_chat_template:
                    raise BadInput(f"{row.where} has chat messages: give --apply-chat-template")
            if file.suffix == ".json" and _begins_array(file):
                yield f"{source.flag}: {file} is one JSON array and read whole; JSON lines (.jsonl) are not"
    except MissingReader as error:
        yield f"{source.flag}: not looked at before the run: {error}"
        return
    except BadInput as error:
        raise BadInput(f"{source.flag}: {error}") from error
    if not rows:
        raise BadInput(f"{source.flag}: prompt set {source.path} cannot be used: it has no rows (the file is empty)")


def _looked_at(file: Path) -> Iterable[Row]:
    """The first rows of a file; of a small one also every `STRIDE`-th after them, and the last."""
    rows = read_rows(file)
    if file.stat().st_size > MOST_BYTES:
        return itertools.islice(rows, FIRST_ROWS)
    return _some(rows)


def _some(rows: Iterable[T]) -> Iterator[T]:
    last: tuple[T, ...] = ()
    for number, row in enumerate(rows):
        if number < FIRST_ROWS or number % STRIDE == 0:
            last = ()
            yield row
        else:
            last = (row,)
    yield from last


def _begins_array(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")

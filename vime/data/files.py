"""Rows of prompt files: JSON lines, JSON, parquet, a folder of shards, a saved dataset; plain or gzipped.

Rows are read one after the other. Errors are BadInput in one line with the file and the line or row.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from vime.errors import BadInput

MOST_ROW_BYTES = 64 * 2**20
"""A longer line is refused: no prompt is as long, and reading on would fill the memory."""
MOST_JSON_BYTES = 2**30
"""A `.json` file is read whole; a larger one has to be JSON lines."""
_FORMATS = ".jsonl, .json, .parquet (each of the first two also with .gz), a folder of them, or a saved dataset"
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\..+)")
_ARROW = "state.json"
_SPLITS = "dataset_dict.json"


@dataclass(frozen=True)
class Row:
    """One row of a prompt set."""

    where: str
    """File and row, for messages."""
    cells: Mapping[str, Any]


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a file or folder. Raises BadInput, at the first row or at the bad one."""
    path = Path(path)
    for file in shards(path):
        yield from _rows_of(file)


def shards(path: Path) -> list[Path]:
    """The files that a prompt set consists of, in order: the file itself, or those of a folder or of its split."""
    if path.is_file():
        return [path]
    if path.is_dir():
        return _folder(path)
    if path.parent.is_dir() and (split := _split_files(path.parent, path.name)):
        return split
    raise BadInput(f"prompt set {path} does not exist: check --prompt-data and --eval-prompt-data")


def _folder(path: Path) -> list[Path]:
    if (path / _SPLITS).is_file():
        names = sorted(each.name for each in path.iterdir() if (each / _ARROW).is_file())
        raise _several_splits(path, names)
    if (path / _ARROW).is_file():
        return _saved_dataset(path)
    inner = path / "data" if not _data_files(path) and (path / "data").is_dir() else path
    files = _data_files(inner)
    if not files:
        raise BadInput(f"prompt set {path} is a folder without prompt files: give {_FORMATS}")
    splits = sorted({match["split"] for file in files if (match := _SHARD.fullmatch(file.name))})
    if len(splits) > 1:
        raise _several_splits(inner, splits)
    return _complete(inner, files)


def _several_splits(path: Path, names: list[str]) -> BadInput:
    listed = ", ".join(names) or "none"
    return BadInput(f"prompt set {path} has several splits ({listed}): give one as {path}/{names[0] if names else '…'}")


def _split_files(folder: Path, split: str) -> list[Path]:
    """Shards `split-00000-of-….parquet` of a folder, or of the `data` folder in it."""
    for place in (folder, folder / "data"):
        files = [f for f in _data_files(place) if (m := _SHARD.fullmatch(f.name)) and m["split"] == split]
        if files:
            return _complete(place, files)
    return []


def _complete(folder: Path, files: list[Path]) -> list[Path]:
    """The files, after a check that all shards that their names count are there."""
    numbered = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    for count in {int(match["count"]) for match in numbered}:
        present = {int(match["number"]) for match in numbered if int(match["count"]) == count}
        if missing := sorted(set(range(count)) - present):
            raise BadInput(f"prompt set {folder} lacks shard {missing[0]} of {count} of its files: fetch it again")
    return files


def _data_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.is_file() and _reader(file) and file.name[0] != ".")


def _saved_dataset(path: Path) -> list[Path]:
    """The arrow files of a folder that `datasets` saved, in its order."""
    try:
        state = json.loads((path / _ARROW).read_text(encoding="utf-8"))
        files = [path / Path(each["filename"]).name for each in state["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"prompt set {path}: its {_ARROW} is not that of a saved dataset ({_line(error)})") from error
    for file in files:
        if not file.is_file():
            raise BadInput(f"prompt set {path} lacks its file {file.name}: save or fetch it again")
    return files


def _reader(path: Path) -> Callable[[Path], Iterator[Row]] | None:
    name = path.name.removesuffix(".gz")
    readers = {".jsonl": _json_lines, ".json": _json_file}
    if not path.name.endswith(".gz"):
        readers |= {".parquet": _parquet_rows, ".arrow": _arrow_rows}
    return readers.get(Path(name).suffix)


def _rows_of(path: Path) -> Iterator[Row]:
    reader = _reader(path)
    if reader is None:
        raise BadInput(f"prompt set {path} is neither JSON lines nor parquet: convert it to {_FORMATS}")
    try:
        yield from reader(path)
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"prompt set {path} cannot be read: {_line(error)}") from error


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.name.endswith(".gz") else open(path, "rb")


def _json_lines(path: Path) -> Iterator[Row]:
    row = 0
    with _opened(path) as file:
        number = 0
        while line := file.readline(MOST_ROW_BYTES + 1):
            number += 1
            if len(line) > MOST_ROW_BYTES:
                raise BadInput(f"{path} line {number} is longer than {MOST_ROW_BYTES >> 20} MiB: shorten or remove it")
            text = _text(path, line, number)
            if not text.strip():
                continue
            row += 1
            if number == 1 and text.strip() == "[":
                raise BadInput(f"{path} is one JSON array, not JSON lines: name it .json, or write one object a line")
            where = f"{path} row {row}" + (f" (line {number})" if row != number else "")
            yield Row(where, _json_object(path, f"line {number}", text))


def _text(path: Path, line: bytes, number: int) -> str:
    if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise BadInput(f"prompt set {path} cannot be read: it is UTF-16; convert it to UTF-8")
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x} at {error.start + 1}"
        raise BadInput(
            f"prompt set {path} cannot be read: line {number} is not UTF-8 ({byte}; perhaps latin-1): convert it"
        ) from error


def _json_object(path: Path, where: str, text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise BadInput(f"{path} {where} is nested too deeply: fix or remove it") from error
    except ValueError as error:
        hint = "; is it CSV?" if where == "line 1" and "," in text and text.lstrip()[0] not in '{["' else ""
        raise BadInput(f"{path} {where} is not JSON ({error}{hint}): fix or remove it") from error
    return _as_object(f"{path} {where}", value)


def _as_object(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadInput(f"{where} is a {type(value).__name__}: every row has to be a JSON object")
    return value


def _json_file(path: Path) -> Iterator[Row]:
    """A JSON array of objects, or objects one after the other, each on one line or pretty-printed."""
    with _opened(path) as file:
        content = file.read(MOST_JSON_BYTES + 1)
    if len(content) > MOST_JSON_BYTES:
        raise BadInput(f"prompt set {path} is larger than {MOST_JSON_BYTES >> 30} GiB: convert it to .jsonl")
    text = _text(path, content, 1)
    del content
    decoder, place, row, array = json.JSONDecoder(), _after_space(text, 0), 0, False
    if array := text[place : place + 1] == "[":
        place = _after_space(text, place + 1)
    while place < len(text) and not (array and text[place] == "]"):
        row += 1
        try:
            value, place = decoder.raw_decode(text, place)
        except RecursionError as error:
            raise BadInput(f"{path} row {row} is nested too deeply: fix or remove it") from error
        except json.JSONDecodeError as error:
            raise BadInput(
                f"{path} line {error.lineno} is not JSON ({error.msg}, row {row}): fix or remove it"
            ) from error
        except ValueError as error:
            raise BadInput(f"{path} row {row} is not JSON ({error}): fix or remove it") from error
        yield Row(f"{path} row {row}", _as_object(f"{path} row {row}", value))
        place = _after_space(text, place)
        if array:
            if text[place : place + 1] not in (",", "]"):
                raise BadInput(f"{path}: its array is not closed after row {row}: fetch or write the file again")
            place = _after_space(text, place + 1) if text[place] == "," else place
    if array and text[place : place + 1] != "]":
        raise BadInput(f"{path}: its array is not closed after row {row}: fetch or write the file again")


_SPACE = re.compile(r"\s*")


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingReader(f"prompt set {path} needs pyarrow: install it, or convert the file to .jsonl") from error
    try:
        with parquet.ParquetFile(path) as file:
            yield from _numbered(path, (row for batch in file.iter_batches(256) for row in batch.to_pylist()))
    except (OSError, ValueError) as error:
        raise BadInput(f"prompt set {path} cannot be read: {_line(error)}") from error


def _arrow_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingReader(f"prompt set {path} needs pyarrow: install it, or convert the file to .jsonl") from error
    try:
        with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as batches:
            yield from _numbered(path, (row for batch in batches for row in batch.to_pylist()))
    except (OSError, ValueError) as error:
        raise BadInput(f"prompt set {path} cannot be read: {_line(error)}") from error


class MissingReader(BadInput):
    """The file's format needs a library that this machine lacks."""


def _numbered(path: Path, rows: Iterator[Mapping[str, Any]]) -> Iterator[Row]:
    for number, cells in enumerate(rows, 1):
        yield Row(f"{path} row {number}", cells)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

"""A launch script of another trainer, read without running it: the recipe that it amounts to.

It understands assignments of plain text, arrays of words (`X_ARGS=( … )`), `source` of files next to the script, and
the command line of `train.py`. Whatever needs a shell (`$(…)`, loops) is named with its line.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vime.errors import BadInput
from vime.recipe.flags import find_target, flag, parse_flags
from vime.recipe.neighbours import ALWAYS_SO, FILTERS, NO_MATTER, RENAMED, REWARDS, advice, plug_in

_ASSIGNED = re.compile(r"^\s*(?:export\s+)?(\w+)(\+?)=(.*)$", re.DOTALL)
_VARIABLE = re.compile(r"\$\{(\w+)(\[@\])?\}|\$(\w+)")
_TRAINER = re.compile(r"\btrain(?:_async)?\.py\b")
_SOURCE = re.compile(r"^\s*(?:source|\.)\s+(\S+)")
_HERE = ("SCRIPT_DIR", "DIR", "BASH_SOURCE")
_OF_RAY = frozenset({"address", "runtime_env_json", "working_dir", "no_wait"})


@dataclass
class Script:
    """Findings in a script."""

    taken: list[tuple[str, list[str]]] = field(default_factory=list)
    """Flags with their words, as vime spells them."""
    renamed: list[tuple[str, str]] = field(default_factory=list)
    """(there, here)."""
    without_meaning: list[tuple[str, str]] = field(default_factory=list)
    """(flag, why)."""
    not_built: list[tuple[str, str]] = field(default_factory=list)
    unread: list[tuple[str, str]] = field(default_factory=list)
    """(file and line, its text)."""

    @property
    def flags(self) -> list[str]:
        """The command line after `--` that the script amounts to."""
        return [word for name, words in self.taken for word in (name, *words)]


def read_script(path: Path) -> Script:
    """The flags that a launch script gives to its trainer. Raises BadInput for a script without any."""
    found, state = Script(), _State()
    _read(path, state, found)
    if not state.command and not any(name.endswith("_ARGS") for name in state.arrays):
        raise BadInput(
            f"{path} has neither arrays of flags (…_ARGS) nor a line that runs train.py: give a launch script"
        )
    arrays = [word for words in state.arrays.values() for word in words]
    words = _known(_words(state.command, state), path.name, "train.py", found) if state.command else arrays
    for name, values in _grouped(words):
        _sort(name, values, found)
    return found


@dataclass
class _State:
    texts: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, list[str]] = field(default_factory=dict)
    command: str = ""
    """Words that follow `train.py`."""


def _read(path: Path, state: _State, found: Script) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the script {path}: {error}") from error
    for number, line in _statements(text):
        where = f"{path.name}:{number}"
        if sourced := _SOURCE.match(line):
            _follow(path, sourced[1].strip("\"'"), where, state, found)
        elif trainer := _TRAINER.search(line):
            state.command += " " + line[trainer.end() :]
        elif assigned := _ASSIGNED.match(line):
            _assign(assigned[1], bool(assigned[2]), assigned[3].strip(), where, state, found)


def _follow(path: Path, name: str, where: str, state: _State, found: Script) -> None:
    """Reads a file that the script sources, where it lies next to or below the script."""
    base = name.split("}/", 1)[-1] if name.startswith("${") else re.sub(r"^\$\w+/", "", name)
    target = (path.parent / base).resolve()
    if target.is_file() and "$" not in base:
        _read(target, state, found)
    else:
        found.unread.append((where, f"source {name}"))


def _assign(name: str, more: bool, value: str, where: str, state: _State, found: Script) -> None:
    if value.startswith("(") and value.endswith(")"):
        words = _known(_words(value[1:-1], state), where, name, found)
        state.arrays[name] = (state.arrays.get(name, []) if more else []) + words
    elif "$(" in value or "`" in value:
        if name not in _HERE and not name.endswith("_DIR"):
            found.unread.append((where, f"{name}={value[:80]}"))
    else:
        state.texts[name] = _expanded(value.strip("\"'"), state)


def _known(words: list[str], where: str, name: str, found: Script) -> list[str]:
    """The words, with a mark for each that only a shell could read; `$BASE_DIR` is vime's own."""
    known = []
    for word in words:
        rest = re.sub(r"\$\{?BASE_DIR\}?", "", word)
        if "$" in rest or "`" in rest:
            found.unread.append((where, f"{name}: {word}"))
            word = _UNREAD
        known.append(word)
    return known


_UNREAD = "\0unread"


def _words(text: str, state: _State) -> list[str]:
    """The words of shell text, with known variables put in; what a `#` starts is left out."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError:
        words = text.split()
    found = []
    for word in words:
        array = re.fullmatch(r"\$\{(\w+)\[@\]\}", word)
        if array:
            found += state.arrays.get(array[1], [])
        else:
            found.append(_expanded(word, state))
    return found


def _expanded(text: str, state: _State) -> str:
    return _VARIABLE.sub(lambda m: state.texts.get(m[1] or m[3], m[0]), text)


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """(line number, statement): continued lines joined, and an array up to its closing parenthesis."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        start, line = number + 1, lines[number]
        number += 1
        if line.lstrip().startswith("#"):
            continue
        while line.endswith("\\") and number < len(lines):
            line, number = line[:-1] + " " + lines[number], number + 1
        if re.match(r"^\s*\w+\+?=\(", line):
            while not re.sub(r"\s#.*", "", line).rstrip().endswith(")") and number < len(lines):
                line, number = line + "\n" + lines[number], number + 1
        yield start, line


def _grouped(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(flag without dashes, its words)."""
    name, values = "", []
    for word in words:
        if word.startswith("--"):
            if name:
                yield name, values
            name, equals, value = word[2:].partition("=")
            values = [value] if equals else []
        elif name:
            values.append(word)
    if name:
        yield name, values


def _sort(name: str, values: list[str], found: Script) -> None:
    key = name.replace("-", "_")
    if _UNREAD in values:
        return
    if key in _OF_RAY:
        found.without_meaning.append((f"--{name}", "the allocation's own Ray is used"))
    elif key in RENAMED:
        here = RENAMED[key]
        found.renamed.append((f"--{name}", flag(here)))
        found.taken.append((flag(here), values))
    elif key in ALWAYS_SO:
        found.without_meaning.append((f"--{name}", ALWAYS_SO[key]))
    elif key in NO_MATTER:
        found.without_meaning.append((f"--{name}", "vime chooses how it is computed"))
    else:
        try:
            find_target(key)
            values = [_plug_in_name(key, value, found) for value in values]
            list(parse_flags([f"--{name}", *values]))
        except BadInput as error:
            told = advice(key) or str(error)
            (found.not_built if told.startswith("not built") or not advice(key) else found.without_meaning).append(
                (f"--{name}", told)
            )
            return
        found.taken.append((f"--{name}", values))


def _plug_in_name(key: str, value: str, found: Script) -> str:
    """The name of a reward or filter as vime writes it."""
    tables = {"rm_type": REWARDS, "dynamic_sampling_filter_path": FILTERS}
    if key not in tables:
        return value
    here = tables[key].get(value) or (plug_in(value) if ":" not in value else None) or value
    if here != value:
        found.renamed.append((value, here))
    return here


def render_script(script: Script) -> str:
    """Fate of every flag, as text."""
    sections = [
        ("Taken as they are", [f"{name} {' '.join(words)}".rstrip() for name, words in script.taken]),
        ("Taken under another name", [f"{there} -> {here}" for there, here in script.renamed]),
        ("No meaning here", [f"{name}: {why}" for name, why in script.without_meaning]),
        ("Not built", [f"{name}: {why}" for name, why in script.not_built]),
        ("Could not be read without running it", [f"{where}: {text}" for where, text in script.unread]),
    ]
    lines = []
    for title, rows in sections:
        lines += [title, *(f"  {row}" for row in rows), ""] if rows else []
    return "\n".join(lines)

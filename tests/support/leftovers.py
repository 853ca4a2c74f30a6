"""Things that a session of tests leaves on the machine: processes, shared memory, folders in /tmp, recorded runs.

A plug-in of pytest: it looks before the first test and after the last, in the process that the others report to, and
fails the session if something is left. Processes are known by a variable that all below the session inherit.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import patience
from vime.run.registry import registry_path

MARK = "VIME_TEST_SESSION"
SHARED_MEMORY = Path("/dev/shm")
OURS = re.compile(r"(vime-|vt-|pymp-|torchelastic_|ray$|psm_|sem\.mp-|vllm|.*wandb-)")
"""Names that vime, its tests and its libraries give; other programs of the machine may come and go."""
KEPT = re.compile(r"vime-\d+$")
"""A user's node-local folder; its caches outlive runs."""
STATE = pytest.StashKey[tuple["Found", str]]()
"""Findings before the first test, and MARK's value in a session around this one, which a test has then started."""


@dataclass(frozen=True)
class Found:
    """Names on the machine at one moment."""

    files: frozenset[str]
    runs: str
    """Content of the list of runs."""


def is_ours(name: str) -> bool:
    return OURS.match(name) is not None and KEPT.match(name) is None


def look(*, nested: bool = False) -> Found:
    """Files that may be a test's, and the recorded runs. Of a `nested` session only its temporary folder counts."""
    folders = (Path(tempfile.gettempdir()), *(() if nested else (SHARED_MEMORY,)))
    files = frozenset(str(path) for folder in folders for path in folder.iterdir() if is_ours(path.name))
    registry = registry_path()
    return Found(files, registry.read_text() if registry.is_file() else "")


def processes_of(mark: str) -> dict[int, str]:
    """Command lines of the processes that were started with this value of MARK, by process id."""
    found, wanted = {}, f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    return found


def others(mine: str) -> bool:
    """True if another session runs on this machine: its files cannot be told from this one's."""
    known = f"{MARK}={mine}".encode()
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                pairs = (folder / "environ").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if any(pair.startswith(f"{MARK}=".encode()) and pair != known for pair in pairs):
                return True
    return False


def left(before: Found, after: Found, running: Iterable[str]) -> list[str]:
    """One line for each thing that is there and was not."""
    lines = [f"process: {command}" for command in running]
    lines += [f"file: {name}" for name in sorted(after.files - before.files)]
    if after.runs != before.runs:
        lines.append("the user's list of runs has changed: give tests an XDG_STATE_HOME of their own")
    return lines


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        outer, os.environ[MARK] = os.environ.get(MARK, ""), uuid.uuid4().hex
        session.config.stash[STATE] = look(nested=bool(outer)), outer


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if STATE not in session.config.stash:
        return
    (before, outer), mine = session.config.stash[STATE], os.environ[MARK]
    deadline = time.monotonic() + patience.MOMENT
    report = session.config.pluginmanager.get_plugin("terminalreporter")
    assert report is not None
    report.ensure_newline()
    alone = bool(outer) or not others(mine)
    if not alone:
        report.write_line("another session of tests runs: files that were left are not told from its own")
    while True:
        after = look(nested=bool(outer)) if alone else before
        lines = left(before, after, processes_of(mine).values())
        if not lines or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    if lines:
        report.write_line("the tests left something behind:\n  " + "\n  ".join(lines), red=True)
        if exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

"""Verification of a stage's outputs against its command and inputs; a stage whose outputs verify is skipped.

When a stage has ended well, each output folder gets a manifest, `.vime-artefact.json`: the stage's fingerprint, and the
marks (`vime.launch.marks`) of all input and output files. A folder whose manifest is missing or disagrees does not
verify.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import time
from pathlib import Path

from vime.errors import BadInput, VimeError
from vime.launch.marks import MANIFEST, Marks, mark_artefact
from vime.run.plan import Artefact, Stage
from vime.system.files import READABLE, write_json
from vime.system.locks import NO_LOCKS
from vime.system.visible import appears

VERSION = 3
_COMMAND_VERSION = 2
"""Raised when the same command starts to make another output, so that older outputs are made again."""
_PARTS = ("size", "time", "inode", "content")
"""Names of a mark's parts, for messages."""
_NAMED = 3
"""Most files that a message names."""


def is_gated(stage: Stage) -> bool:
    """True for a stage that makes artefacts which a later run can reuse."""
    return bool(stage.outputs) and all(output.kind != "run" for output in stage.outputs)


def fingerprint(stage: Stage, run_dir: str) -> str:
    """Hash of the stage's command and size. The run folder in the command does not count."""
    command = [word.replace(run_dir, "<run>") for word in stage.command]
    content = [_COMMAND_VERSION, command, len(stage.nodes), stage.tasks_per_node]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class OutputLock:
    """Lets one run at a time make a stage's outputs, for people who share a folder.

    A file lock, which the kernel releases when its holder ends. On a file system without locks nobody waits.
    """

    def __init__(self, stage: Stage) -> None:
        self._paths = [Path(output.path) for output in stage.outputs]
        self._files: list[int] = []

    def take(self) -> bool:
        """Take the lock; False while another run holds it. Raises BadInput if its file cannot be made."""
        self.release()
        for path in self._paths:
            try:
                self._files.append(_open_lock(path))
                fcntl.flock(self._files[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.release()
                return False
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    self.release()
                    raise _not_ours(path, error) from error
        return True

    def release(self) -> None:
        while self._files:
            os.close(self._files.pop())


def _open_lock(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    name, flags = path.with_name(f".{path.name}.vime-lock"), os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, os.O_RDWR | os.O_CREAT | flags, READABLE)
    except PermissionError:
        # Another user's file: a reader may lock it too, at least on this host's own file systems.
        return os.open(name, os.O_RDONLY | flags)


def _not_ours(path: Path, error: OSError) -> BadInput:
    return BadInput(
        f"{path} cannot be made here ({error.filename or path}: {error.strerror}): ask the owner of the folder for "
        "the artefact and the right to read it, or give a --base-dir of your own"
    )


def difference(stage: Stage, run_dir: str) -> str | None:
    """One line with the reason and the files that differ; None if the outputs verify."""
    try:
        return _difference(stage, run_dir)
    except PermissionError as error:
        return f"{error.filename} cannot be read ({error.strerror}), so nothing is verified"


def _difference(stage: Stage, run_dir: str) -> str | None:
    manifests = {output.path: _read(Path(output.path)) for output in stage.outputs}
    for path, manifest in manifests.items():
        if manifest is None:
            return f"{path} has no manifest"
        if manifest.get("fingerprint") != fingerprint(stage, run_dir):
            return f"{path} was made by another command"
    inputs = _content(stage.inputs)
    for output in stage.outputs:
        manifest = manifests[output.path] or {}
        # Version 2 had other digests: compare only size, time and inode.
        parts = len(_PARTS) if manifest.get("version") == VERSION else len(_PARTS) - 1
        for artefact in stage.inputs:
            changed = _changed(manifest.get("inputs", {}).get(artefact.name, {}), inputs[artefact.name], parts)
            if changed:
                return f"{output.path} was made from other inputs: {artefact.path}: {changed}"
        changed = _changed(manifest.get("files", {}), mark_artefact(output), parts)
        if changed:
            return f"files of {output.path} have changed since they were made: {changed}"
    return None


def _changed(before: Marks, now: Marks, parts: int = len(_PARTS)) -> str:
    """Differences in the first `parts` parts of marks, a few words per file; empty if equal."""
    words = []
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            words.append(f"{name} is gone")
        elif name not in before:
            words.append(f"{name} is new")
        elif before[name][:parts] != now[name][:parts]:
            pairs = zip(_PARTS[:parts], before[name][:parts], now[name][:parts], strict=True)
            words.append(f"{name} has another {', '.join(part for part, old, new in pairs if old != new)}")
    more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    return "; ".join(words[:_NAMED]) + more


def prepare(stage: Stage, run_dir: str) -> list[str]:
    """Make room for the outputs; return the folders moved aside, in words.

    Partial output of this same stage stays: its tool resumes from there. Other output of vime that does not verify is
    moved aside. A folder that vime did not make is left alone; the stage then reports that it exists.
    Raises BadInput if another user's folder or file is in the way.
    """
    try:
        return _prepare(stage, run_dir)
    except PermissionError as error:
        raise _not_ours(Path(stage.outputs[0].path), error) from error


def _prepare(stage: Stage, run_dir: str) -> list[str]:
    moved, claim = [], _claim(stage, run_dir)
    for output in stage.outputs:
        path, marker = Path(output.path), _marker(output)
        sealed, claimed = _read(path) is not None, _load(marker)
        if path.exists() and (sealed or claimed not in (None, claim)):
            aside = path.with_name(f"{path.name}.stale-{time.strftime('%Y%m%d-%H%M%S')}")
            os.rename(path, aside)
            moved.append(f"{path} moved to {aside.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Names the folder's maker, in case the controller ends before the manifest is written.
        write_json(marker, claim, mode=READABLE)
    return moved


def seal(stage: Stage, run_dir: str) -> None:
    """Write the manifests, after the stage has ended well.

    Raises VimeError if an output is missing, BadInput if an input has changed since `prepare`.
    """
    claim = _claim(stage, run_dir)
    for output in stage.outputs:
        # Written on another node, so it may appear late.
        path, shown = Path(output.path), appears(output.path)
        files = mark_artefact(output) if shown else {}
        before = (_load(_marker(output)) or {}).get("inputs", {})
        for artefact in stage.inputs:
            if changed := _changed(before.get(artefact.name, {}), claim["inputs"][artefact.name]):
                raise BadInput(
                    f"{artefact.path} changed while {stage.name} read it ({changed}): submit again when it is complete"
                )
        if not path.is_dir() or not files:
            raise VimeError(f"stage {stage.name} ended too early, without its output {path}: look at its log")
        content = {"version": VERSION, "stage": stage.name, **claim, "files": files}
        write_json(path / MANIFEST, content, mode=READABLE)
        # Readable to those who can read the artefact, so that they can verify it.
        (path / MANIFEST).chmod(stat.S_IMODE(path.stat().st_mode) & 0o644)
        _marker(output).unlink(missing_ok=True)


def _claim(stage: Stage, run_dir: str) -> dict:
    """Fingerprint of the stage and marks of its inputs."""
    return {"fingerprint": fingerprint(stage, run_dir), "inputs": _content(stage.inputs)}


def _content(artefacts: tuple[Artefact, ...]) -> dict[str, Marks]:
    return {artefact.name: mark_artefact(artefact) for artefact in artefacts}


def _marker(output: Artefact) -> Path:
    path = Path(output.path)
    return path.with_name(f".{path.name}.vime-stage.json")


def _read(folder: Path) -> dict | None:
    """Manifest of a folder; None if missing or truncated."""
    return _load(folder / MANIFEST)


def _load(path: Path) -> dict | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        # Truncated: shows only that vime made the folder.
        return {}
    return content if isinstance(content, dict) else {}

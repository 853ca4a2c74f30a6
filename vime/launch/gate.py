"""Whether a stage's outputs are what this stage makes of these inputs: then it is skipped.

Every output folder gets a manifest, `.vime-artefact.json`, when its stage has ended well: the stage's fingerprint, and
name, size and time of every file of inputs and outputs. A folder without one, or one that no longer agrees, verifies
nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

from vime.errors import VimeError
from vime.planning.types import Artefact, Stage

MANIFEST = ".vime-artefact.json"
VERSION = 1
Files = dict[str, tuple[int, int]]
"""(size in bytes, mtime in ns) by path below the artefact."""


def is_gated(stage: Stage) -> bool:
    """Whether the stage makes artefacts that a later run can take over."""
    return bool(stage.outputs) and all(output.kind != "run" for output in stage.outputs)


def fingerprint(stage: Stage, run_dir: str) -> str:
    """Hash of what the stage does: its command and size. The run folder in the command does not count."""
    command = [word.replace(run_dir, "<run>") for word in stage.command]
    content = [VERSION, command, len(stage.nodes), stage.tasks_per_node]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def list_files(artefact: Artefact) -> Files:
    """Every file of an artefact, a folder or one file; empty where it is missing."""
    root = Path(artefact.path)
    if root.is_file():
        return {root.name: _stat(root)}
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if name != MANIFEST:
                found[str(path.relative_to(root))] = _stat(path)
    return dict(sorted(found.items()))


def _stat(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def difference(stage: Stage, run_dir: str) -> str | None:
    """Why the outputs do not verify, in one line; None when they do."""
    inputs = _content(stage.inputs)
    for output in stage.outputs:
        manifest = _read(Path(output.path))
        if manifest is None:
            return f"{output.path} has no manifest"
        if manifest.get("fingerprint") != fingerprint(stage, run_dir):
            return f"{output.path} was made by another command"
        if manifest.get("inputs") != inputs:
            return f"{output.path} was made from other inputs"
        if manifest.get("files") != _plain(list_files(output)):
            return f"files of {output.path} have changed since they were made"
    return None


def prepare(stage: Stage, run_dir: str) -> list[str]:
    """Makes room for the outputs: what an earlier run of a stage left there, and is not right, is moved aside.

    A folder that vime did not make is left where it is; the stage then says that it exists. What was moved is returned.
    """
    moved = []
    for output in stage.outputs:
        path, marker = Path(output.path), _marker(output)
        ours = _read(path) is not None or marker.exists()
        if path.exists() and ours:
            aside = path.with_name(f"{path.name}.stale-{time.strftime('%Y%m%d-%H%M%S')}")
            os.rename(path, aside)
            moved.append(f"{path} moved to {aside.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Says who makes the folder, should the controller end before the manifest is written.
        _write(marker, {"fingerprint": fingerprint(stage, run_dir)})
    return moved


def seal(stage: Stage, run_dir: str) -> None:
    """Writes the manifests, after the stage has ended well. Raises VimeError where an output is missing."""
    inputs = _content(stage.inputs)
    for output in stage.outputs:
        path, files = Path(output.path), list_files(output)
        if not path.is_dir() or not files:
            raise VimeError(f"stage {stage.name} ended too early, without its output {path}: look at its log")
        content = {"fingerprint": fingerprint(stage, run_dir), "inputs": inputs, "files": _plain(files)}
        _write(path / MANIFEST, {"version": VERSION, "stage": stage.name, **content})
        _marker(output).unlink(missing_ok=True)


def _content(artefacts: tuple[Artefact, ...]) -> dict[str, dict[str, list[int]]]:
    return {artefact.name: _plain(list_files(artefact)) for artefact in artefacts}


def _plain(files: Files) -> dict[str, list[int]]:
    """As JSON gives it back."""
    return {name: list(values) for name, values in files.items()}


def _marker(output: Artefact) -> Path:
    path = Path(output.path)
    return path.with_name(f".{path.name}.vime-stage.json")


def _read(folder: Path) -> dict | None:
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Missing or cut: it says nothing about the folder.
        return None
    return content if isinstance(content, dict) else None


def _write(path: Path, content: dict) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

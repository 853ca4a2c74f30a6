"""Fingerprints of all files of an artefact, in the form of its manifest."""

from __future__ import annotations

import os
from pathlib import Path

from vime.run.plan import Artefact
from vime.system.fingerprint import Fingerprint, fingerprints

MANIFEST = ".vime-artefact.json"
NOT_CONTENT = (MANIFEST, ".vime-fetch.json", ".cache")
"""Files that vime and huggingface_hub add to a folder; not part of its content."""

Mark = list[int | str]
"""[size in bytes, mtime in ns, inode, digest], the JSON form of a Fingerprint."""
Marks = dict[str, Mark]
"""Marks by path below the artefact."""


def mark_artefact(artefact: Artefact) -> Marks:
    """Marks of all files of an artefact, a folder or one file; empty if it is missing."""
    root = Path(artefact.path)
    paths = [root] if root.is_file() else files_of(root)
    names = [root.name] if root.is_file() else [str(path.relative_to(root)) for path in paths]
    return {name: _mark(found) for name, found in zip(names, fingerprints(paths), strict=True)}


def files_of(root: Path) -> list[Path]:
    """Content files of a folder, sorted."""
    paths = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in NOT_CONTENT]
        paths += [Path(folder, name) for name in names if name not in NOT_CONTENT]
    return sorted(paths)


def _mark(found: Fingerprint) -> Mark:
    return [found.size, found.mtime_ns, found.inode, found.digest]

"""Fingerprints of all files of an artefact, as its manifest holds them."""

from __future__ import annotations

import os
from pathlib import Path

from vime.run.plan import Artefact
from vime.system.fingerprint import Fingerprint, fingerprints

MANIFEST = ".vime-artefact.json"
NOT_CONTENT = (MANIFEST, ".vime-fetch.json", ".cache")
"""Notes of vime and huggingface_hub about a folder; they are not part of its content."""

Mark = list[int | str]
"""[size in bytes, mtime in ns, inode, digest], the JSON form of a Fingerprint."""
Marks = dict[str, Mark]
"""By path below the artefact."""


def mark_artefact(artefact: Artefact) -> Marks:
    """Marks of all files of an artefact, a folder or one file; empty where it is missing."""
    root = Path(artefact.path)
    paths = [root] if root.is_file() else files_of(root)
    names = [root.name] if root.is_file() else [str(path.relative_to(root)) for path in paths]
    return {name: _mark(found) for name, found in zip(names, fingerprints(paths), strict=True)}


def files_of(root: Path) -> list[Path]:
    """Files of a folder that are content, sorted."""
    paths = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in NOT_CONTENT]
        paths += [Path(folder, name) for name in names if name not in NOT_CONTENT]
    return sorted(paths)


def _mark(found: Fingerprint) -> Mark:
    return [found.size, found.mtime_ns, found.inode, found.digest]

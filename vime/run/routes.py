"""Routes of a rollout's tokens to experts, from the engines to the trainer's ranks: one file, read in parts.

A row holds the experts of one token in every layer. A sample of n tokens has n - 1 rows, since its last token was never
computed with. Rows go through a file in the run folder, from which each rank maps the layers of its stage and the
tokens of its share; they are never an argument of a call, since a long rollout has gigabytes of them.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vime.errors import DataError
from vime.system.files import PRIVATE
from vime.system.private import private_folder

FOLDER = "routes"
_LENGTH_BYTES = 8


def routes_path(run_dir: str | Path, rollout_id: int) -> Path:
    """File of a rollout's routes."""
    return Path(run_dir) / FOLDER / f"{rollout_id:06d}.routes"


def _kind(experts: int) -> np.dtype[Any]:
    return np.dtype(np.uint8 if experts <= 256 else np.uint16)


def write_routes(path: Path, samples: Sequence[np.ndarray], *, experts: int) -> int:
    """Write the rows of all samples, [rows, layers, top-k] each; returns the file's bytes."""
    private_folder(path.parent)
    kind = _kind(experts)
    shape = samples[0].shape[1:]
    head = json.dumps({"kind": kind.name, "shape": shape, "rows": [len(rows) for rows in samples]}).encode()
    path.unlink(missing_ok=True)
    # Not brought to the disk: a start after a crash generates the rollout again.
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE), "wb") as file:
        file.write(len(head).to_bytes(_LENGTH_BYTES, "little") + head)
        for rows in samples:
            # Layers first, so that a stage's layers of a sample lie together.
            file.write(np.ascontiguousarray(rows.astype(kind, copy=False).transpose(1, 0, 2)).data)
        return file.tell()


def remove_routes(run_dir: str | Path, rollout_id: int | None = None) -> None:
    """Remove the routes of a rollout, or of all rollouts."""
    if rollout_id is not None:
        routes_path(run_dir, rollout_id).unlink(missing_ok=True)
        return
    folder = Path(run_dir) / FOLDER
    if folder.is_dir():
        for entry in os.scandir(folder):
            os.unlink(entry.path)


class RoutesFile:
    """The routes of one rollout, mapped from their file."""

    def __init__(self, path: Path) -> None:
        """Raises DataError for a file that is missing or not whole."""
        try:
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(_LENGTH_BYTES), "little")
                head = json.loads(file.read(size))
        except (OSError, ValueError) as error:
            raise DataError(f"routes {path} cannot be read: {error}") from error
        self.layers, self.top_k = head["shape"]
        rows: list[int] = head["rows"]
        self._rows, self._kind = rows, np.dtype(head["kind"])
        elements = self.layers * self.top_k
        self._starts = list(itertools.accumulate((count * elements for count in rows), initial=0))
        first = _LENGTH_BYTES + size
        if path.stat().st_size != first + self._starts[-1] * self._kind.itemsize:
            raise DataError(f"routes {path} are not whole: {path.stat().st_size} bytes")
        self._data = np.memmap(path, self._kind, "r", offset=first, shape=(max(1, self._starts[-1]),))

    def of(self, sample: int) -> np.ndarray:
        """Routes of a sample by its place in the rollout, [layers, rows, top-k], mapped and not read."""
        shape = (self.layers, self._rows[sample], self.top_k)
        start = self._starts[sample]
        return self._data[start : start + math.prod(shape)].reshape(shape)

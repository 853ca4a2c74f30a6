"""Finished rollouts that no checkpoint holds yet: a run that resumes trains on them again instead of generating them.

<run>/rollouts/kept/000012.npz    token ids, log-probs, versions and masks of all samples, and the rest as JSON
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vime.run.checkpoints import tracked, tracks_iteration
from vime.run.folder import PLAN
from vime.samples import Group, Rollout, Sample
from vime.system.files import PRIVATE, draft, remove_drafts
from vime.system.private import private_folder

MOST_KEPT = 16
"""Rollouts kept behind a checkpoint; later ones are generated again, which bounds the disk that they take."""
_SUSPECTS = 2
"""Newest rollouts of which training may have had one under way: engines may be one rollout ahead."""
_PER_TOKEN: Mapping[str, str] = {
    "response_ids": "int32",
    "log_probs": "float64",
    "weight_versions": "int32",
    "loss_mask": "uint8",
    "teacher_log_probs": "float64",
}
"""Fields with one number per response token, each with its dtype in the file."""
_MAY_BE_EMPTY = frozenset({"teacher_log_probs"})
"""Those of `_PER_TOKEN` that a sample may lack; they are among the rest where one does."""
_REST = "rest"


@dataclass(frozen=True)
class Kept:
    """One kept rollout."""

    rollout: Rollout
    sampler: dict[str, Any]
    """The sampler's state when the rollout was finished."""


class KeptRollouts:
    """The kept rollouts of one run. Those of another plan or other code of the run are not used."""

    def __init__(self, run_dir: str | Path, checkpoints: str | Path | None) -> None:
        """`checkpoints` is the folder whose tracker says what is saved; None for a run that saves nothing."""
        self._folder, self._checkpoints = Path(run_dir) / "rollouts" / "kept", checkpoints
        self._plan = Path(run_dir) / PLAN

    def write(self, rollout: Rollout, sampler: Mapping[str, Any]) -> None:
        """Keep a rollout until a checkpoint holds it. A failure costs only a later generation and is printed."""
        if self._checkpoints is None:
            return
        try:
            self._remove_saved()
            if rollout.rollout_id - self._saved() <= MOST_KEPT:
                private_folder(self._folder)
                remove_drafts(self._path(rollout.rollout_id))
                arrays: dict[str, Any] = _packed(rollout, sampler, self._mark())
                with (
                    draft(self._path(rollout.rollout_id), mode=PRIVATE) as number,
                    open(number, "wb", closefd=False) as file,
                ):
                    np.savez(file, **arrays)
        except (OSError, TypeError) as error:
            # TypeError: the data set's values do not fit JSON.
            print(f"warning: rollout {rollout.rollout_id} is not kept for a resume: {error}", flush=True)

    def read(self, rollout_id: int) -> Kept | None:
        """The rollout if it was kept whole by this plan and code, else None.

        The newest ones are given once: training on one of them may be what ended the run.
        """
        path = self._path(rollout_id)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                rest = json.loads(bytes(arrays[_REST]))
                if rest["mark"] != self._mark():
                    return None
                columns = {name: arrays[name] for name in _PER_TOKEN if name in arrays or name not in _MAY_BE_EMPTY}
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            print(f"warning: {path} cannot be read, so the rollout is generated again: {error}", flush=True)
            return None
        if len([number for number in self._numbers() if number > rollout_id]) < _SUSPECTS:
            path.unlink()
        return _unpacked(rollout_id, rest, columns)

    def drop(self, rollout_id: int) -> None:
        """Drop a rollout that must not be trained on again."""
        self._path(rollout_id).unlink(missing_ok=True)

    def _saved(self) -> int:
        """Newest rollout that a checkpoint holds; -1 without one."""
        assert self._checkpoints is not None
        return int(tracked(self._checkpoints)) if tracks_iteration(self._checkpoints) else -1

    def _remove_saved(self) -> None:
        newest = self._saved()
        for number in self._numbers():
            if number <= newest:
                self._path(number).unlink()

    def _numbers(self) -> list[int]:
        """Rollouts that are kept."""
        names = (path.stem for path in self._folder.glob("*.npz")) if self._folder.is_dir() else ()
        return [int(name) for name in names if name.isdigit()]

    def _path(self, rollout_id: int) -> Path:
        return self._folder / f"{rollout_id:06d}.npz"

    def _mark(self) -> str:
        """Digest of the plan, which names the settings and the run's copy of the code."""
        return hashlib.sha256(self._plan.read_bytes()).hexdigest()


def _packed(rollout: Rollout, sampler: Mapping[str, Any], mark: str) -> dict[str, np.ndarray]:
    samples = rollout.samples
    absent = {n for n in _MAY_BE_EMPTY if any(len(getattr(s, n)) != len(s.response_ids) for s in samples)}
    rows, columns = [], {name: [] for name in _PER_TOKEN if name not in absent}
    for sample in rollout.samples:
        row = sample.values()
        for name, column in columns.items():
            column.append(np.asarray(row.pop(name), dtype=_PER_TOKEN[name]))
        rows.append({**row, "size": len(sample.response_ids)})
    rest = {"mark": mark, "metrics": rollout.metrics, "rows": rollout.rows, "sampler": sampler, "samples": rows}
    arrays = {name: np.concatenate(column) if column else np.empty(0) for name, column in columns.items()}
    return {**arrays, _REST: np.frombuffer(json.dumps(rest).encode(), dtype="uint8")}


def _unpacked(rollout_id: int, rest: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> Kept:
    groups: dict[int, Group] = {}
    start = 0
    for row in rest["samples"]:
        end = start + row.pop("size")
        sample = Sample.from_values(row | {name: column[start:end].tolist() for name, column in columns.items()})
        groups.setdefault(sample.group_index, Group(sample.group_index, [])).samples.append(sample)
        start = end
    rows = [(name, number) for name, number in rest["rows"]]
    return Kept(Rollout(rollout_id, list(groups.values()), rest["metrics"], rows), rest["sampler"])

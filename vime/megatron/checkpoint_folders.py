"""The folder of a run's checkpoints: finding whole ones, publishing, removing old ones.

<save>/iter_0000012/    Megatron's .metadata, *.distcp, common.pt, metadata.json; vime.json: state and fingerprints
<save>/latest_checkpointed_iteration.txt    names the newest complete one, written last
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vime.checkpoint.torch_dist import write_tracker
from vime.errors import BadInput
from vime.run.checkpoints import TRACKER, folder_of, held, iterations, partial_of, tracked
from vime.system.files import READABLE, publish_folder, write_json
from vime.system.fingerprint import fingerprints

STATE_FILE = "vime.json"


@dataclass(frozen=True)
class State:
    """State of a checkpoint, other than its tensors."""

    rollout_id: int
    """Last rollout trained on."""
    optimizer_steps: int
    extra: dict[str, Any]
    """The driver's state, as JSON."""
    with_optimizer: bool = True


def _files(folder: Path) -> dict[str, tuple[int, str]]:
    """Bytes and digest of every file except the state's."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != STATE_FILE)
    return {path.name: (found.size, found.digest) for path, found in zip(paths, fingerprints(paths), strict=True)}


def damage(folder: Path) -> str | None:
    """Reason why a checkpoint cannot be loaded; None if unchanged since written, as far as fingerprints tell."""
    try:
        content = json.loads((folder / STATE_FILE).read_text())
        written = [(name, size, digest) for name, (size, digest) in content["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {STATE_FILE} cannot be read ({error})"
    try:
        found = _files(folder)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    for name, size, digest in written:
        if name not in found:
            return f"{name} is missing"
        if found[name][0] != size:
            return f"{name} has {found[name][0]} bytes, {size} were written"
        if found[name][1] != digest:
            return f"{name} does not hold what was written"
    return None


def newest_whole(root: Path, warn: Callable[[str], None] = print) -> Path:
    """Find the newest whole checkpoint; reports damage in newer ones. Raises BadInput if there is none."""
    content = tracked(root)
    if not content.isdigit():
        return root / content
    for number in iterations(root):
        folder = folder_of(root, number)
        if number > int(content):
            warn(f"warning: {folder} is newer than {TRACKER} says ({content}): left out")
            continue
        wrong = damage(folder)
        if wrong is None:
            return folder
        warn(f"warning: {folder} cannot be used, {wrong}: taking the checkpoint before it")
    raise BadInput(
        f"{root / TRACKER} names iteration {content}, but no checkpoint in {root} is whole: give another --load"
    )


def read_state(folder: Path) -> State:
    """State of a whole checkpoint."""
    content = json.loads((folder / STATE_FILE).read_text())
    return State(content["rollout_id"], content["optimizer_steps"], content["extra"], content["with_optimizer"])


def fresh_partial(root: Path, rollout_id: int) -> Path:
    """Make an empty folder for writing a checkpoint; removes leftovers of killed writers.

    Raises BadInput if nothing can be written.
    """
    partial = partial_of(root, rollout_id)
    try:
        root.mkdir(parents=True, exist_ok=True)
        for path in root.glob(".iter_*"):
            shutil.rmtree(path)
        partial.mkdir()
    except OSError as error:
        raise BadInput(f"cannot write checkpoints below {root} ({error.strerror}): give another --save") from error
    return partial


def publish(root: Path, state: State, *, keep: int, layout: dict[str, int]) -> Path:
    """Write state and fingerprints, rename the folder, update the tracker, remove old checkpoints beyond `keep`."""
    partial, target = partial_of(root, state.rollout_id), folder_of(root, state.rollout_id)
    content = {
        "rollout_id": state.rollout_id,
        "optimizer_steps": state.optimizer_steps,
        "with_optimizer": state.with_optimizer,
        "layout": layout,
        "extra": state.extra,
        "files": _files(partial),
    }
    write_json(partial / STATE_FILE, content, mode=READABLE)
    if target.exists():
        os.rename(target, root / f".{target.name}.replaced")
    publish_folder(partial, target)
    write_tracker(root, str(state.rollout_id))
    shutil.rmtree(root / f".{target.name}.replaced", ignore_errors=True)
    # Newer ones come from a run that was set back to an older checkpoint; they stay until their number is reused.
    older = [number for number in iterations(root) if number <= state.rollout_id]
    in_use = held(root)
    for number in older[max(1, keep) :]:
        if number not in in_use:
            shutil.rmtree(folder_of(root, number))
    return target

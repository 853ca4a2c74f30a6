"""The folder of a run's checkpoints: which are whole, how one is published, and which leave.

<save>/iter_0000012/    Megatron's .metadata, *.distcp, common.pt, metadata.json; vime.json: state and fingerprints
<save>/latest_checkpointed_iteration.txt    names the newest complete one, written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vime.checkpoint.torch_dist import write_tracker
from vime.errors import BadInput
from vime.run.checkpoints import TRACKER, folder_of, iterations, partial_of, tracked
from vime.system.files import publish_folder

STATE_FILE = "vime.json"
_READ_WHOLE = 16 << 20
_BLOCKS, _BLOCK_BYTES = 16, 64 << 10
# A shared file system answers many small reads at a time as fast as one.
_READERS = 32


@dataclass(frozen=True)
class State:
    """What a checkpoint holds besides tensors."""

    rollout_id: int
    """The last rollout that it was trained on."""
    optimizer_steps: int
    extra: dict[str, Any]
    """The driver's; JSON."""
    with_optimizer: bool = True


def fingerprint(path: Path) -> str:
    """Digest of a file's size and bytes: all of them up to 16 MiB, else 16 blocks of 64 KiB from start to end."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as stream:
        if size <= _READ_WHOLE:
            digest.update(stream.read())
        else:
            for block in range(_BLOCKS):
                stream.seek((size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


def fingerprints(folder: Path) -> dict[str, tuple[int, str]]:
    """Bytes and fingerprint of every file."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != STATE_FILE)
    with ThreadPoolExecutor(_READERS) as pool:
        return {
            path.name: (path.stat().st_size, digest)
            for path, digest in zip(files, pool.map(fingerprint, files), strict=True)
        }


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be loaded; None for one that is as it was written, as far as fingerprints tell."""
    try:
        content = json.loads((folder / STATE_FILE).read_text())
        written = [(name, size, digest) for name, (size, digest) in content["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {STATE_FILE} cannot be read ({error})"
    try:
        found = fingerprints(folder)
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
    """The newest checkpoint that is whole; says what is wrong with newer ones. Raises BadInput if there is none."""
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
    """The state in a whole checkpoint."""
    content = json.loads((folder / STATE_FILE).read_text())
    return State(content["rollout_id"], content["optimizer_steps"], content["extra"], content["with_optimizer"])


def fresh_partial(root: Path, rollout_id: int) -> Path:
    """An empty folder to write a checkpoint into; what writers that were killed have left is removed.

    Raises BadInput where nothing can be written.
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
    """State and fingerprints into the written folder, rename, tracker, and the old ones beyond `keep` away."""
    partial, target = partial_of(root, state.rollout_id), folder_of(root, state.rollout_id)
    content = {
        "rollout_id": state.rollout_id,
        "optimizer_steps": state.optimizer_steps,
        "with_optimizer": state.with_optimizer,
        "layout": layout,
        "extra": state.extra,
        "files": fingerprints(partial),
    }
    with (partial / STATE_FILE).open("w") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    if target.exists():
        os.rename(target, root / f".{target.name}.replaced")
    publish_folder(partial, target)
    write_tracker(root, str(state.rollout_id))
    shutil.rmtree(root / f".{target.name}.replaced", ignore_errors=True)
    # Newer ones are of a run that was set back to an older checkpoint; they stay until their number comes again.
    older = [number for number in iterations(root) if number <= state.rollout_id]
    for number in older[max(1, keep) :]:
        shutil.rmtree(folder_of(root, number))
    return target

"""Names in a folder of checkpoints. Standard library only: login nodes read them too.

<save>/iter_0000012/                        a published checkpoint
<save>/.iter_0000012.partial/               one that is being written, or whose writer was killed
<save>/release/                             weights without a rollout number, made by the conversion
<save>/latest_checkpointed_iteration.txt    the tracker: names the newest complete one, written last
<save>/in_use_0000012                       the driver still reads it: it is not removed yet
"""

from __future__ import annotations

import re
from pathlib import Path

from vime.errors import BadInput
from vime.system.files import PRIVATE, write_file

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
_ITERATION = re.compile(r"iter_([0-9]{1,18})")
_NUMBER = re.compile(r"[0-9]{1,18}")
_MOST_BYTES = 4096
_PARTIAL = re.compile(r"\.iter_\d+\.partial")
_IN_USE = "in_use_"


def folder_of(root: str | Path, rollout_id: int) -> Path:
    """`<root>/iter_0000012`."""
    return Path(root) / f"iter_{rollout_id:07d}"


def partial_of(root: str | Path, rollout_id: int) -> Path:
    """Folder into which a checkpoint is written before it is published."""
    return Path(root) / f".{folder_of(root, rollout_id).name}.partial"


def iteration_of(name: str) -> int | None:
    """Rollout number in a published checkpoint's folder name; None for any other name."""
    match = _ITERATION.fullmatch(name)
    return int(match[1]) if match else None


def is_partial(name: str) -> bool:
    """True for the folder name of a checkpoint that was never published."""
    return _PARTIAL.fullmatch(name) is not None


def iterations(root: Path) -> list[int]:
    """Numbers of the published checkpoints, newest first."""
    names = (path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else ()
    return sorted((number for name in names if (number := iteration_of(name)) is not None), reverse=True)


def hold(root: str | Path, rollout_id: int) -> None:
    """Keep a checkpoint, published or not yet, from being removed as an old one until `let_go`."""
    write_file(Path(root) / f"{_IN_USE}{rollout_id:07d}", "", mode=PRIVATE)


def let_go(root: str | Path, rollout_id: int) -> None:
    """The checkpoint may be removed with the next save."""
    (Path(root) / f"{_IN_USE}{rollout_id:07d}").unlink(missing_ok=True)


def held(root: str | Path) -> set[int]:
    """Numbers of checkpoints that are in use."""
    names = (path.name.removeprefix(_IN_USE) for path in Path(root).glob(f"{_IN_USE}*"))
    return {int(name) for name in names if _NUMBER.fullmatch(name)}


def has_tracker(root: str | Path | None) -> bool:
    """True for a folder with a tracker."""
    return root is not None and (Path(root) / TRACKER).exists()


def tracked(root: str | Path) -> str:
    """Content of the tracker: an iteration's number or `release`.

    Raises OSError without a tracker, BadInput for any other content, such as the path of a folder.
    """
    with open(Path(root) / TRACKER, "rb") as file:
        content = file.read(_MOST_BYTES).decode(errors="replace").strip()
    if content != RELEASE and _NUMBER.fullmatch(content) is None:
        raise BadInput(
            f"{Path(root) / TRACKER} says {content[:80]!r}, neither a rollout's number nor {RELEASE}: "
            "give another folder"
        )
    return content


def tracked_folder(root: str | Path) -> Path:
    """Folder that the tracker names. Raises OSError without a tracker."""
    name = tracked(root)
    return Path(root) / RELEASE if name == RELEASE else folder_of(root, int(name))


def tracks_iteration(root: str | Path | None) -> bool:
    """True if the tracker names a rollout, at which a run resumes; False for `release` and without a tracker."""
    return root is not None and has_tracker(root) and tracked(root).isdigit()

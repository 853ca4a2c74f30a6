"""Training checkpoints: torch_dist with model and optimizer, published whole or not at all, loadable at any layout.

<save>/iter_0000012/           .metadata, *.distcp, common.pt, metadata.json (Megatron's), vime.json (state, sizes)
<save>/latest_checkpointed_iteration.txt    names the newest complete one, written last
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vime.checkpoint.durable import publish_folder
from vime.checkpoint.torch_dist import TRACKER, TorchDistReader, use_disk_keys, write_tracker
from vime.errors import BadInput
from vime.megatron.naming import fill, local_tensors
from vime.megatron.optimizer import Optimizer
from vime.models.config import ModelConfig
from vime.models.transform import shard
from vime.recipe.parallel import Coordinates, ParallelLayout

STATE_FILE = "vime.json"
_ITERATION = re.compile(r"^iter_(\d+)$")


@dataclass(frozen=True)
class State:
    """What a checkpoint holds besides tensors."""

    rollout_id: int
    """The last rollout that it was trained on."""
    optimizer_steps: int
    extra: dict[str, Any]
    """The driver's; JSON."""


def folder_of(root: str | Path, rollout_id: int) -> Path:
    """`<root>/iter_0000012`."""
    return Path(root) / f"iter_{rollout_id:07d}"


def has_tracker(root: str | Path | None) -> bool:
    """Whether the folder says that it holds a checkpoint."""
    return root is not None and (Path(root) / TRACKER).exists()


def iterations(root: Path) -> list[int]:
    """Numbers of the published checkpoints, newest first."""
    names = (path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else ()
    return sorted((int(match[1]) for name in names if (match := _ITERATION.match(name))), reverse=True)


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be loaded; None for a whole one. Looks at names and sizes, not at every byte."""
    try:
        content = json.loads((folder / STATE_FILE).read_text())
        sizes: dict[str, int] = content["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{STATE_FILE} cannot be read ({error})"
    for name, size in sizes.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            return f"{name} is missing ({error.strerror})"
        if found != size:
            return f"{name} has {found} bytes, {size} were written"
    return None


def newest_whole(root: Path, warn: Callable[[str], None] = print) -> Path:
    """The newest checkpoint that is whole; says what is wrong with newer ones. Raises BadInput if there is none."""
    content = (root / TRACKER).read_text().strip()
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


class Checkpointer:
    """Saves and loads one trainer's state; every method is called on all ranks at the same time."""

    def __init__(
        self,
        chunks: Sequence[Any],
        optimizer: Optimizer | None,
        config: ModelConfig,
        layout: ParallelLayout,
        coords: Coordinates,
        *,
        keep: int = 2,
        background: bool = False,
    ) -> None:
        self._chunks, self._optimizer = chunks, optimizer
        self._config, self._layout, self._coords = config, layout, coords
        self._keep, self._background = keep, background
        self._queue: Any = None

    def save(self, root: str | Path, state: State, *, with_optimizer: bool = True) -> Path:
        """Write `<root>/iter_…`, publish it by rename, then write the tracker; older ones beyond `keep` are removed.

        In the background the folder appears by the time `finish` returns, the next `save` or `poll` at the latest.
        """
        from megatron.core import dist_checkpointing

        self.finish()
        root = Path(root)
        partial = root / f".{folder_of(root, state.rollout_id).name}.partial"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        content: dict[str, Any] = {"model": self._model_state(), "iteration": state.rollout_id}
        content["checkpoint_version"] = 3.0
        if with_optimizer and self._optimizer is not None:
            content["optimizer"] = self._optimizer.sharded_state(content["model"])

        def publish() -> None:
            if dist.get_rank() == 0:
                self._publish(root, partial, state, with_optimizer)

        request = dist_checkpointing.save(
            content, str(partial), _parallel_writer(), async_sharded_save=self._background
        )
        if request is None:
            dist.barrier()
            publish()
            dist.barrier()
        else:
            request.add_finalize_fn(publish)
            self._calls().schedule_async_request(request)
        return folder_of(root, state.rollout_id)

    def poll(self) -> None:
        """Publish a background checkpoint that is complete."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait for a background checkpoint."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=True)

    def close(self) -> None:
        """Finish and end the writer's process."""
        if self._queue is not None:
            self.finish()
            self._queue.close()
            self._queue = None

    def load(self, root: str | Path) -> tuple[State, Path]:
        """Weights and optimizer of the newest whole checkpoint, whatever layout it was saved at."""
        from megatron.core import dist_checkpointing

        folder = Path(_from_first(lambda: str(newest_whole(Path(root)))))
        content = json.loads((folder / STATE_FILE).read_text())
        state = State(content["rollout_id"], content["optimizer_steps"], content["extra"])
        wanted: dict[str, Any] = {"model": self._model_state()}
        with_optimizer = self._optimizer is not None and content["with_optimizer"]
        if with_optimizer:
            assert self._optimizer is not None
            self._optimizer.steps = state.optimizer_steps
            wanted["optimizer"] = self._optimizer.sharded_state(wanted["model"], to_load=True)
        loaded: Any = dist_checkpointing.load(wanted, str(folder))
        self._chunks[0].load_state_dict(loaded["model"], strict=True)
        if with_optimizer:
            assert self._optimizer is not None
            self._optimizer.take_state(loaded["optimizer"])
        self._took_weights(reload=not with_optimizer)
        return state, folder

    def load_weights(self, root: str | Path) -> Path:
        """Weights alone, from any torch_dist folder (`release` of the conversion too)."""
        reader = TorchDistReader(root, self._config)
        tensors = local_tensors(self._chunks, self._config, self._layout, self._coords)
        fill(tensors, lambda param: shard(param, reader.read(param), self._layout, self._coords))
        self._took_weights(reload=True)
        return reader.path

    def took_weights(self) -> None:
        """Tell that the chunks were filled from elsewhere, so that the master weights follow."""
        self._took_weights(reload=True)

    def _took_weights(self, *, reload: bool) -> None:
        if self._optimizer is None:
            return
        if reload:
            self._optimizer.reload_master_weights()
        self._optimizer.check_master_weights()

    def _model_state(self) -> dict[str, Any]:
        """The model's sharded state under Transformer Engine's keys, whichever layer spec runs."""
        from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

        # The embedding's copy beside MTP layers on a later stage needs the group to know which rank writes it.
        state = self._chunks[0].sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(None))
        use_disk_keys(state, self._config)
        return {name: entry for name, entry in state.items() if not name.endswith("_extra_state")}

    def _publish(self, root: Path, partial: Path, state: State, with_optimizer: bool) -> None:
        """Rank 0: sizes and state into the folder, rename, tracker, and the old ones away."""
        sizes = {path.name: path.stat().st_size for path in partial.iterdir() if path.is_file()}
        content = {
            "rollout_id": state.rollout_id,
            "optimizer_steps": state.optimizer_steps,
            "with_optimizer": with_optimizer,
            "layout": {name: getattr(self._layout, name) for name in ("world_size", "tp", "pp", "cp", "ep", "etp")},
            "extra": state.extra,
            "files": sizes,
        }
        with (partial / STATE_FILE).open("w") as stream:
            json.dump(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        target = folder_of(root, state.rollout_id)
        if target.exists():
            shutil.rmtree(target)
        publish_folder(partial, target)
        write_tracker(root, str(state.rollout_id))
        # Newer ones are of a run that was set back to an older checkpoint; they stay until their number comes again.
        older = [number for number in iterations(root) if number <= state.rollout_id]
        for number in older[max(1, self._keep) :]:
            shutil.rmtree(folder_of(root, number))

    def _calls(self) -> Any:
        if self._queue is None:
            from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

            self._queue = AsyncCallsQueue(persistent=False)
        return self._queue


def _parallel_writer() -> Any:
    """Megatron's writer, with the replicas of a data-parallel group sharing the work."""
    from megatron.core import parallel_state as ps
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

    group: Any = ps.get_data_parallel_group(with_context_parallel=True)
    return FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), group)


def _from_first(call: Callable[[], str]) -> str:
    """What rank 0 finds, on all ranks; its BadInput is raised on all of them."""
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [call()]
        except BadInput as error:
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], BadInput):
        raise found[0]
    return found[0]

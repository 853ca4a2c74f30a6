"""Training checkpoints: torch_dist with model and optimizer, published whole or not at all, loadable at any layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vime.checkpoint.allowed import check_training_checkpoint
from vime.checkpoint.torch_dist import TorchDistReader, object_name, use_disk_keys
from vime.errors import BadInput
from vime.megatron import checkpoint_folders as folders
from vime.megatron import megatron_lm
from vime.megatron.checkpoint_folders import State
from vime.megatron.optimizer import Optimizer
from vime.models.checkpoint_args import checkpoint_args
from vime.models.config import ModelConfig
from vime.models.disk import extra_states
from vime.models.local import fill, local_tensors
from vime.models.transform import shard
from vime.recipe.parallel import Coordinates, ParallelLayout
from vime.system.memory import return_free_memory

# Transformer Engine's states of modules; of grouped experts one for each, numbered from the second on.
_EXTRA_STATE = re.compile(r"\b_extra_state\d*$")


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
        samples_per_step: int = 1,
    ) -> None:
        self._chunks, self._optimizer = chunks, optimizer
        self._config, self._layout, self._coords = config, layout, coords
        self._keep, self._background, self._batch = keep, background, samples_per_step
        self._queue: Any = None

    def save(self, root: str | Path, state: State) -> Path:
        """Write `<root>/iter_…`, publish it by rename, then write the tracker; older ones beyond `keep` are removed.

        In the background the folder appears by the time `finish` returns, the next `save` or `poll` at the latest.
        """
        from megatron.core import dist_checkpointing

        self.finish()
        root = Path(root)
        partial = _from_first(lambda: str(folders.fresh_partial(root, state.rollout_id)))
        content = self._content(state)
        layout = {name: getattr(self._layout, name) for name in ("world_size", "tp", "pp", "cp", "ep", "etp")}

        def publish() -> None:
            if dist.get_rank() == 0:
                folders.publish(root, state, keep=self._keep, layout=layout)

        request = dist_checkpointing.save(
            content,
            partial,
            _parallel_writer(),
            async_sharded_save=self._background,
            preprocess_common_before_consistancy_check=_same_everywhere,
            content_metadata=dict(megatron_lm.CONTENT),
        )
        if request is None:
            dist.barrier()
            publish()
            dist.barrier()
        else:
            request.add_finalize_fn(publish)
            self._calls().schedule_async_request(request)
        return_free_memory()
        return folders.folder_of(root, state.rollout_id)

    def _content(self, state: State) -> dict[str, Any]:
        """Model and optimizer, and what Megatron-LM's own loader looks for beside them. Collective."""
        model = self._model_state()
        with_optimizer = state.with_optimizer and self._optimizer is not None
        content: dict[str, Any] = {
            "model": model,
            "iteration": state.rollout_id,
            "checkpoint_version": 3.0,
            "num_floating_point_operations_so_far": 0,
            "args": checkpoint_args(
                self._config,
                self._layout,
                mtp=any(name.startswith("mtp.") for name in model),
                bf16=self._chunks[0].config.bf16,
                global_batch_size=self._batch,
                with_optimizer=with_optimizer,
            ),
            "extra_states": self._extra_states(),
        }
        if with_optimizer:
            assert self._optimizer is not None
            content["optimizer"] = self._optimizer.state_to_save(model)
            content["opt_param_scheduler"] = self._optimizer.scheduler_state(self._batch)
            content["rng_state"] = megatron_lm.random_state(self._layout, self._coords)
        return content

    def poll(self) -> bool:
        """Publish a background checkpoint that is complete; whether none is under way any more."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=False)
        return self._queue is None or self._queue.get_num_unfinalized_calls() == 0

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

        folder = Path(_from_first(lambda: str(_checked(folders.newest_whole(Path(root))))))
        state = folders.read_state(folder)
        wanted: dict[str, Any] = {"model": self._model_state()}
        with_optimizer = self._optimizer is not None and state.with_optimizer
        if with_optimizer:
            assert self._optimizer is not None
            self._optimizer.steps = state.optimizer_steps
            wanted["optimizer"] = self._optimizer.sharded_state(wanted["model"], to_load=True)
        loaded: Any = dist_checkpointing.load(wanted, str(folder))
        module = self._chunks[0]
        states = dict.fromkeys(name for name in module.state_dict() if name.endswith("_extra_state"))
        module.load_state_dict({**states, **loaded["model"]}, strict=True)
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

        # The embedding's copy next to MTP layers on a later stage needs the group to know which rank writes it.
        state = self._chunks[0].sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(None))
        use_disk_keys(state, self._config)
        return {name: entry for name, entry in state.items() if not _EXTRA_STATE.search(name)}

    def _extra_states(self) -> dict[str, Any]:
        """Empty states of Transformer Engine's modules, as Megatron's own loader expects them; nobody here reads them.

        Which spec runs does not matter: a checkpoint of a CPU holds them too.
        """
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        coords, found = self._coords, {}
        for local in local_tensors(self._chunks, self._config, self._layout, coords):
            copy = (0, coords.tp, coords.dp * self._layout.cp + coords.cp)
            if local.param.expert is not None:
                copy = (0, coords.etp, coords.edp)
            for state in extra_states(local.param, self._config):
                name = object_name(state.key, state.index, state.stack)
                shape, offset = state.stack or (1,), state.index or (0,)
                found[name] = ShardedObject(state.key, None, shape, offset, replica_id=copy)
        return found

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


def _same_everywhere(common: dict[str, Any]) -> dict[str, Any]:
    """The part of the plain values that is the same on every rank; which optimizers one has depends on its place."""
    return {name: value for name, value in common.items() if name != "optimizer"}


def _checked(folder: Path) -> Path:
    """The folder, once nothing in it can run code when Megatron opens it."""
    check_training_checkpoint(folder)
    return folder


def _from_first(call: Callable[[], str]) -> str:
    """Rank 0's finding, on all ranks; its BadInput is raised on all of them."""
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

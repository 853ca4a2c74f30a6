"""Parts of a checkpoint that Megatron-LM's own loader wants at its defaults, and that vime never reads back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from vime.recipe.parallel import Coordinates, ParallelLayout
from vime.recipe.schema import OptimizerOptions

FULLY_RESHARDABLE = "fully_reshardable"
CONTENT = {
    "distrib_optim_sharding_type": FULLY_RESHARDABLE,
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
"""Says how model and optimizer are laid out; handed to their `sharded_state_dict` on loading."""


def scheduler_state(options: OptimizerOptions, steps: int, total_steps: int, batch: int) -> dict[str, Any]:
    """State of Megatron's OptimizerParamScheduler after `steps` steps; Megatron-LM counts samples, `batch` a step."""
    return {
        "max_lr": options.lr,
        "min_lr": options.min_lr,
        "lr_warmup_steps": options.lr_warmup_iters * batch,
        "lr_decay_steps": (options.lr_decay_iters or total_steps) * batch,
        "lr_decay_style": options.lr_decay_style,
        "num_steps": steps * batch,
        "start_wd": options.weight_decay,
        "end_wd": options.weight_decay,
        "wd_incr_style": "constant",
        "wd_incr_steps": total_steps * batch,
    }


def random_state(layout: ParallelLayout, coords: Coordinates) -> Any:
    """States of this rank's generators, sharded as Megatron-LM shards them."""
    from megatron.core import tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    states = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tracker.get_states(),
    }
    replica = coords.dp * layout.cp + coords.cp
    shape, place = (layout.pp, layout.tp), (coords.pp, coords.tp)
    if layout.ep > 1:
        shape, place, replica = (*shape, layout.dp * layout.cp), (*place, replica), 0
    return ShardedObject("rng_state", [states], shape, place, replica_id=replica)


def optimizer_common(optimizer: Any, steps: int) -> dict[str, Any]:
    """Values of one of Megatron's optimizers that are no tensors of parameters, after `steps` steps.

    Plain values alone: groups of an optimizer on the host hold classes too, and a pickle that names a class is refused
    on loading.
    """
    groups = [
        {**{name: value for name, value in group.items() if name != "params" and _is_plain(value)}, "step": steps}
        for group in optimizer.optimizer.state_dict()["param_groups"]
    ]
    return {"optimizer": {"param_groups": groups}, "param_state_sharding_type": FULLY_RESHARDABLE}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(one) for one in value)
    return value is None or type(value) in (bool, int, float, str)

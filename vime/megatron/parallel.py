"""Process groups of one layout, and the layouts that cannot be trained."""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist

from vime.errors import BadInput
from vime.megatron import backend
from vime.models.config import ModelConfig
from vime.models.shards import check_layout
from vime.recipe.parallel import Coordinates, ParallelLayout
from vime.system.rendezvous import group_store

COLLECTIVE_S = 1500.0
"""Limit of one collective operation in gloo and NCCL: above the time in which the driver finds a hang, below the
deadlines of its phases."""


def refuse_wrong(config: ModelConfig, layout: ParallelLayout) -> None:
    """Raises BadInput for a layout that does not fit the model or that is known to train it wrongly."""
    check_layout(config, layout)
    if layout.tp == 1:
        return
    if config.vocab_size % layout.tp:
        raise BadInput(
            f"the vocabulary of {config.vocab_size} does not divide by --tensor-model-parallel-size {layout.tp}: "
            "the columns that fill it up would count in every probability, use a divisor"
        )
    if config.moe is not None and not layout.sequence_parallel:
        raise BadInput(
            f"TP{layout.tp} without --sequence-parallel: Megatron trains mixtures of experts under tensor parallelism "
            "with it only, add the flag"
        )
    if config.mla is not None and not layout.sequence_parallel:
        raise BadInput(
            f"TP{layout.tp} without --sequence-parallel: the gradient of the shared rope key of latent attention "
            "would miss the other ranks' heads, add the flag"
        )


def init_parallel(
    layout: ParallelLayout,
    *,
    rank: int | None = None,
    master_address: str | None = None,
    master_port: int | None = None,
    seed: int = 1234,
    timeout_s: float = COLLECTIVE_S,
    key: bytes | None = None,
) -> Coordinates:
    """Join the process group and build Megatron's groups; returns where this rank stands.

    Rank and address come from RANK, MASTER_ADDR and MASTER_PORT when they are not given. `key` is the group's.
    """
    device = backend.setup()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    rank = int(os.environ["RANK"]) if rank is None else rank
    address = master_address or os.environ["MASTER_ADDR"]
    port = master_port or int(os.environ["MASTER_PORT"])
    if not dist.is_initialized():
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group(
            device.distributed,
            store=group_store(address, port, rank, layout.world_size, timeout, key),
            rank=rank,
            world_size=layout.world_size,
            timeout=timeout,
            # No `device_id`: with it every group makes its communicator at once, 0.4 GB of GPU memory for each of
            # Megatron's 17, of which a run uses a few.
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=True,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    coords = layout.coordinates(rank)
    check_coordinates(coords)
    return coords


def check_coordinates(coords: Coordinates) -> None:
    """The plan's arithmetic and Megatron's groups must agree; everything that is sharded depends on it."""
    from megatron.core import parallel_state as ps

    theirs = Coordinates(
        dist.get_rank(),
        ps.get_tensor_model_parallel_rank(),
        ps.get_context_parallel_rank(),
        ps.get_data_parallel_rank(),
        ps.get_pipeline_model_parallel_rank(),
        ps.get_expert_model_parallel_rank(),
        ps.get_expert_tensor_parallel_rank() or 0,
        ps.get_expert_data_parallel_rank(),
    )
    if theirs != coords:
        raise AssertionError(f"rank {coords.rank}: Megatron's place {theirs} differs from the plan's {coords}")


def destroy_parallel() -> None:
    """Leave the groups; the process can build another layout afterwards."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()

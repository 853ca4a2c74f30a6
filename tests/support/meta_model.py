"""Parameter counts of Megatron models of any size and layout: built on the meta device, in a faked process group.

    python meta_model.py < cases.json > counts.json

A case is `{"hf": config.json, "layout": ParallelLayout's fields, "mtp": bool, "ranks": [...]}`; each answer is
`{rank: {name: elements}}` of the rank's parameters. Only the process group is not real: building a model sends
nothing, so a process can stand for any rank of any number of ranks.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from vime.megatron import backend
from vime.models.config import ModelConfig
from vime.recipe.parallel import ParallelLayout

META = torch.device("meta")


def on_meta_device() -> None:
    """vime's own backend of a machine without GPUs, with another device."""

    class Meta(backend.Backend):
        @property
        def cpu(self) -> bool:
            return True

    backend.setup()
    torch.cuda.current_device = lambda: META  # type: ignore[assignment,return-value]
    meta = Meta(META, "gloo", False)
    backend.setup = lambda: meta  # type: ignore[assignment]


def count(case: dict[str, Any], rank: int) -> dict[str, int]:
    """Elements of every parameter of one rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from vime.megatron.model import build_model
    from vime.megatron.parallel import check_coordinates

    layout = ParallelLayout(**case["layout"])
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            create_gloo_process_groups=False,
        )
        check_coordinates(layout.coordinates(rank))
        model_parallel_cuda_manual_seed(1)
        with META:
            (model,) = build_model(ModelConfig.from_hf(case["hf"]), layout, bf16=True, mtp=case["mtp"])
        return {name: parameter.numel() for name, parameter in model.named_parameters()}
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


if __name__ == "__main__":
    on_meta_device()
    answers = [{rank: count(case, rank) for rank in case["ranks"]} for case in json.load(sys.stdin)]
    json.dump(answers, sys.stdout)

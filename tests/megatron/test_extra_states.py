"""States of Transformer Engine's modules in checkpoints, with a stand-in for it: nothing of ours depends on them, and
Megatron's own loader finds all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.single import MODELS, built, fill_from, one_process
from tests.support.te_stand_in import add_states, numbered
from vime.checkpoint.torch_dist import object_name, use_disk_keys
from vime.megatron.checkpoint_folders import State
from vime.megatron.checkpointing import Checkpointer
from vime.megatron.model import build_model
from vime.megatron.optimizer import Optimizer
from vime.models.config import ModelConfig
from vime.models.disk import extra_states
from vime.models.families import params_of
from vime.recipe.parallel import ParallelLayout
from vime.recipe.schema import ModelOptions, OptimizerOptions, Recipe

RECIPE = Recipe(name="r", model=ModelOptions(bf16=False), optimizer=OptimizerOptions(lr=1e-2))


def checkpointer(hf: dict[str, Any], layout: ParallelLayout, chunks: list[Any]) -> tuple[Checkpointer, Optimizer]:
    config = ModelConfig.from_hf(hf)
    optimizer = Optimizer(chunks, RECIPE, total_steps=2)
    return Checkpointer(chunks, optimizer, config, layout, layout.coordinates(0)), optimizer


@pytest.mark.parametrize("model", MODELS)
def test_states_are_saved_whichever_spec_runs_and_a_strict_load_misses_none(model: str, tmp_path: Path) -> None:
    hf, config = MODELS[model], ModelConfig.from_hf(MODELS[model])
    with one_process() as layout:
        chunks = built(hf, layout)
        assert add_states(chunks, config) > 0
        first, optimizer = checkpointer(hf, layout, chunks)
        plain = chunks[0].sharded_state_dict
        chunks[0].sharded_state_dict = lambda *args, **kwargs: numbered(plain(*args, **kwargs), 8)
        folder = first.save(tmp_path, State(0, 0, {}))
        weights = {name: value.clone() for name, value in chunks[0].state_dict().items() if torch.is_tensor(value)}

        others = build_model(config, layout, bf16=False)
        add_states(others, config)
        second, other = checkpointer(hf, layout, others)
        second.load(tmp_path)
        for name, value in weights.items():
            assert torch.equal(others[0].state_dict()[name], value), name
        optimizer.close()
        other.close()
    stored = torch.distributed.checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    wanted = {
        object_name(state.key, state.index, state.stack)
        for param in params_of(config)
        if not param.name.startswith("mtp.")
        for state in extra_states(param, config)
    }
    assert {name for name in stored if "_extra_state" in name} == wanted


@pytest.mark.parametrize("model", MODELS)
def test_megatrons_own_loader_finds_every_key_of_its_own_spec(model: str, tmp_path: Path) -> None:
    """At its default strictness, with the states of a model that has them."""
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    hf, config = MODELS[model], ModelConfig.from_hf(MODELS[model])
    with one_process() as layout:
        ours, optimizer = checkpointer(hf, layout, built(hf, layout))
        folder = ours.save(tmp_path, State(0, 0, {}))
        chunks = build_model(config, layout, bf16=False)
        add_states(chunks, config)
        sharded = chunks[0].sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(None))
        use_disk_keys(sharded, config)
        loaded: Any = dist_checkpointing.load({"model": sharded}, str(folder))
        chunks[0].load_state_dict(loaded["model"], strict=True)
        expected = build_model(config, layout, bf16=False)
        fill_from(expected, hf, layout)
        for (name, mine), theirs in zip(chunks[0].named_parameters(), expected[0].parameters(), strict=True):
            assert torch.equal(mine, theirs), name
        optimizer.close()

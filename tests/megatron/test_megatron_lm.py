"""Megatron-LM's own `--load` reads what the trainer and the conversion write, at its defaults."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import megatron_lm, patience, tiny_hf
from tests.support.single import MODELS, built, one_process
from vime.checkpoint.allowed import check_training_checkpoint, read_common
from vime.checkpoint.convert import convert
from vime.checkpoint.hf import HFCheckpoint
from vime.megatron.checkpoint_folders import State
from vime.megatron.checkpointing import Checkpointer
from vime.megatron.optimizer import Optimizer
from vime.models.checkpoint_args import checkpoint_args
from vime.models.config import ModelConfig
from vime.recipe.parallel import ParallelLayout
from vime.recipe.schema import ModelOptions, OptimizerOptions, Recipe

CASES = [("deepseek", False), ("deepseek", True), ("qwen3", False), ("qwen3_moe", False)]
TOTAL, BATCH, STEPS = 10, 4, 2
RECIPE = Recipe(
    name="r",
    model=ModelOptions(bf16=False),
    optimizer=OptimizerOptions(lr=1e-2, min_lr=1e-3, lr_warmup_iters=2, lr_decay_style="linear"),
)


def stepped(chunks: list[Any], recipe: Recipe = RECIPE) -> Optimizer:
    """An optimizer after STEPS steps with the same gradients for the same model."""
    optimizer = Optimizer(chunks, recipe, total_steps=TOTAL)
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for parameter in optimizer.chunks[0].parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step()
    return optimizer


def scheduler_of(optimizer: Any) -> Any:
    """Megatron-LM's for the same options; it counts samples."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    options = RECIPE.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=options.lr_warmup_iters * BATCH,
        lr_decay_steps=TOTAL * BATCH,
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=TOTAL * BATCH,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
    )


@pytest.mark.parametrize(("model", "mtp"), CASES)
def test_a_training_checkpoint_with_optimizer_scheduler_and_random_states(
    model: str, mtp: bool, tmp_path: Path
) -> None:
    hf, config = MODELS[model], ModelConfig.from_hf(MODELS[model])
    with one_process() as layout:
        chunks = built(hf, layout, mtp=mtp)
        recipe = RECIPE.model_copy(update={"model": ModelOptions(bf16=False, mtp_num_layers=int(mtp))})
        ours = stepped(chunks, recipe)
        writer = Checkpointer(chunks, ours, config, layout, layout.coordinates(0), samples_per_step=BATCH)
        folder = writer.save(tmp_path, State(7, STEPS, {}))
        check_training_checkpoint(folder)
        drawn = torch.rand(3)

        theirs = megatron_lm.core_model(config, layout, mtp=mtp)
        # A stranger's optimizer: of the core, after a step of its own, so that torch's Adam has states to load into.
        other = stepped([theirs], recipe)
        scheduler = scheduler_of(other.megatron)
        args = checkpoint_args(config, layout, mtp=mtp)
        iteration = megatron_lm.load_checkpoint(
            folder, other.chunks[0].module, other.megatron, scheduler, args, config, release=False
        )
        assert iteration == 7
        assert scheduler.num_steps == STEPS * BATCH
        assert scheduler.get_lr({}) == pytest.approx(RECIPE.optimizer.lr)
        assert torch.equal(torch.rand(3), drawn)
        mine, loaded = dict(chunks[0].named_parameters()), dict(theirs.named_parameters())
        assert len(mine) == len(loaded) > 10
        states = _states(ours), _states(other)
        for (name, value), other_name in zip(mine.items(), loaded, strict=True):
            assert torch.equal(value, loaded[other_name]), (name, other_name)
        assert _steps(ours) == _steps(other) == {STEPS}
        for a, b in zip(*states, strict=True):
            assert torch.equal(a["exp_avg"], b["exp_avg"])
            assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])
        ours.close()
        other.close()


def _states(optimizer: Optimizer) -> list[dict[str, torch.Tensor]]:
    return [state for each in optimizer.megatron.chained_optimizers for state in each.optimizer.state.values()]


def _steps(optimizer: Optimizer) -> set[int]:
    """Steps that Adam has counted: torch's in each parameter's state, Transformer Engine's in the groups."""
    groups = [group for each in optimizer.megatron.chained_optimizers for group in each.optimizer.param_groups]
    return {int(found["step"]) for found in [*_states(optimizer), *groups] if "step" in found}


def converted(checkpoint: HFCheckpoint, target: Path, layout: ParallelLayout) -> None:
    """Convert as the stage does, which knows no GPU: its ranks meet over gloo, and those of a GPU over NCCL."""
    if not torch.cuda.is_available():
        assert convert(checkpoint, target, layout, 0)
        return
    argv = [
        sys.executable,
        "-m",
        "vime.checkpoint.convert",
        "--hf-checkpoint",
        str(checkpoint.path),
        "--save",
        str(target),
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(argv, check=True, env=environment, timeout=patience.PROCESS)


@pytest.mark.parametrize(("model", "mtp"), CASES)
def test_a_converted_release(model: str, mtp: bool, tmp_path: Path) -> None:
    hf, config = MODELS[model], ModelConfig.from_hf(MODELS[model])
    checkpoint = HFCheckpoint(tiny_hf.write_folder(tmp_path / "hf", hf, tiny_hf.random_tensors(hf)))
    with one_process() as layout:
        converted(checkpoint, tmp_path / "out", layout)
        theirs = megatron_lm.core_model(config, layout, mtp=mtp)
        args = checkpoint_args(config, layout, mtp=mtp)
        folder = tmp_path / "out" / "release"
        assert megatron_lm.load_checkpoint(folder, theirs, None, None, args, config, release=True) == 0
        expected = built(hf, layout, mtp=mtp)[0]
        for (name, a), b in zip(expected.named_parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(a, b.to(a.dtype), rtol=2**-8, atol=0), name


@pytest.mark.parametrize("kind", ["iter", "release"])
@pytest.mark.parametrize("model", MODELS)
def test_use_checkpoint_args_finds_the_model(model: str, kind: str, tmp_path: Path) -> None:
    """Every argument that `load_args_from_checkpoint` takes is there, and is the model's."""
    hf, config = MODELS[model], ModelConfig.from_hf(MODELS[model])
    with one_process() as layout:
        if kind == "iter":
            chunks = built(hf, layout)
            writer = Checkpointer(chunks, None, config, layout, layout.coordinates(0))
            folder = writer.save(tmp_path, State(0, 0, {}, with_optimizer=False))
        else:
            checkpoint = HFCheckpoint(tiny_hf.write_folder(tmp_path / "hf", hf, tiny_hf.random_tensors(hf)))
            converted(checkpoint, tmp_path / "out", layout)
            folder = tmp_path / "out" / "release"
    found = vars(read_common(folder / "common.pt")["args"])
    wanted = megatron_lm.TAKEN + (megatron_lm.TAKEN_OF_EXPERTS if config.moe else ())
    assert [name for name in wanted if found.get(name) is None] == []
    assert (found["num_layers"], found["hidden_size"]) == (hf["num_hidden_layers"], hf["hidden_size"])
    assert found["num_query_groups"] == config.num_kv_heads
    assert found["untie_embeddings_and_output_weights"] is not hf["tie_word_embeddings"]
    if config.moe:
        experts = hf.get("n_routed_experts") or hf["num_experts"]
        assert (found["num_experts"], found["moe_router_topk"]) == (experts, hf["num_experts_per_tok"])


def test_the_layout_is_the_one_that_wrote(tmp_path: Path) -> None:
    layout = ParallelLayout(world_size=16, tp=2, pp=4, ep=2, last_stage_layers=1)
    args = checkpoint_args(ModelConfig.from_hf(tiny_hf.DEEPSEEK), layout, mtp=True, global_batch_size=64)
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 4)
    assert (args.expert_model_parallel_size, args.world_size, args.data_parallel_size) == (2, 16, 2)
    assert copy.copy(args) == args

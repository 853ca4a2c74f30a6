"""The plan of the tiny recipes with real files: stages, derived values, notes; and every input that is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vime.errors import BadInput
from vime.planning.build import make_plan
from vime.planning.cluster import load_cluster
from vime.recipe.load import load_recipe
from vime.run.plan import Cluster, Plan

GPUS = Cluster(name="gpus", kind="slurm", gpus_per_node=8)


def build(base: Path, *flags: str, recipe: str = "tiny-deepseek-r1", **options: Any) -> Plan:
    options = {"cluster": load_cluster("local"), "run_name": "first", **options}
    return make_plan(load_recipe(recipe, flags), base_dir=base, **options)


def stage(plan: Plan, name: str):
    return next(stage for stage in plan.stages if stage.name == name)


def test_stages_of_the_tiny_recipe_on_one_and_on_two_nodes(base_dir: Path):
    names = ["preflight", "rehearsal", "cast", "convert", "ray-head", "train", "report"]
    assert [stage.name for stage in build(base_dir).stages] == names
    two = build(base_dir, nodes=2)
    assert [stage.name for stage in two.stages] == [*names[:5], "ray-workers", *names[5:]]
    assert stage(two, "preflight").nodes == (0, 1)
    assert stage(two, "ray-workers").nodes == (1,)
    assert [stage.name for stage in two.stages if stage.service] == ["ray-head", "ray-workers"]
    assert (two.layout.world_size, two.layout.dp, len(two.engines)) == (2, 2, 2)


def test_commands_read_what_the_stage_before_wrote(base_dir: Path):
    plan = build(base_dir)
    fp8, bf16, dist = (str(base_dir / f"tiny-deepseek-r1{end}") for end in ("", "-bf16", "_torch_dist"))
    cast, convert = stage(plan, "cast"), stage(plan, "convert")
    assert cast.command == (
        *("-m", "vime.checkpoint.cast", "--input-fp8-hf-path", fp8),
        *("--output-bf16-hf-path", bf16),
    )
    assert convert.command[:2] == ("-m", "vime.checkpoint.convert")
    assert convert.command[-4:] == ("--hf-checkpoint", bf16, "--save", dist)
    assert cast.outputs == convert.inputs
    assert convert.outputs[0] in stage(plan, "train").inputs
    assert stage(plan, "train").command == ("-m", "vime.train", "--run", plan.run_dir)
    assert stage(plan, "ray-head").command[-1] == "--head"


def test_the_conversion_option_decides_which_stages_there_are(base_dir: Path):
    one_pass = build(base_dir, "--conversion", "one-pass")
    assert "cast" not in [stage.name for stage in one_pass.stages]
    assert str(base_dir / "tiny-deepseek-r1") in stage(one_pass, "convert").command
    direct = build(base_dir, "--conversion", "direct")
    assert not {"cast", "convert"} & {stage.name for stage in direct.stages}
    assert "cast" not in [
        stage.name for stage in build(base_dir, "--conversion", "two-stage", recipe="tiny-qwen3").stages
    ]


def test_load_of_an_hf_folder_is_a_start_without_a_conversion(base_dir: Path):
    start = base_dir / "tiny-deepseek-r1"
    plan = build(base_dir, "--load", str(start), "--save", str(base_dir / "saved"))
    assert [stage.name for stage in plan.stages] == ["preflight", "rehearsal", "ray-head", "train", "report"]
    options = plan.recipe.checkpoint
    assert (options.start_from, options.conversion) == (str(start), "direct")
    # A run that is started again finds what it saved.
    assert (options.load, options.save) == (str(base_dir / "saved"), str(base_dir / "saved"))
    assert str(start) in [artefact.path for artefact in stage(plan, "train").inputs]
    assert any("without a conversion" in note for note in plan.notes)
    next(start.glob("*2-of*")).unlink()
    with pytest.raises(BadInput, match=r"00002-of-00002\.safetensors"):
        build(base_dir, "--start-from", str(start))


def test_a_deep_verification_reads_what_was_made_before_it_is_used(base_dir: Path):
    plan = build(base_dir, verify_deep=True)
    names = [stage.name for stage in plan.stages]
    assert names[:4] == ["preflight", "rehearsal", "cast", "convert"]
    assert names[4:] == ["verify-cast", "verify-convert", "ray-head", "train", "report"]
    two = [stage.name for stage in build(base_dir, nodes=2, verify_deep=True).stages]
    assert [name for name in two if name.startswith("verify-")] == ["verify-cast", "verify-convert"]
    convert, verify = stage(plan, "convert"), stage(plan, "verify-convert")
    assert verify.command == (*convert.command, "--verify")
    assert (verify.nodes, verify.tasks_per_node, verify.outputs) == (convert.nodes, convert.tasks_per_node, ())
    direct = build(base_dir, "--conversion", "direct", verify_deep=True)
    assert [stage.name for stage in direct.stages] == ["preflight", "rehearsal", "ray-head", "train", "report"]


def test_the_conversion_of_r1_is_the_seed_documents():
    from vime.planning.build import Checks

    checks = Checks(inputs=False, run_folder=False)
    plan = make_plan(load_recipe("deepseek-r1"), cluster=GPUS, base_dir="/base", checks=checks)
    convert = stage(plan, "convert")
    assert (convert.nodes, convert.tasks_per_node) == ((0, 1, 2, 3), 8)
    flags = dict(zip(convert.command[2::2], convert.command[3::2], strict=True))
    assert flags == {
        "--tensor-model-parallel-size": "1",
        "--pipeline-model-parallel-size": "8",
        "--expert-tensor-parallel-size": "1",
        "--expert-model-parallel-size": "4",
        "--decoder-first-pipeline-num-layers": "7",
        "--decoder-last-pipeline-num-layers": "6",
        "--hf-checkpoint": "/base/DeepSeek-R1",
        "--save": "/base/DeepSeek-R1_torch_dist",
    }
    # Deadlines grow with the bytes: 2 TB by four nodes takes more than an hour at worst, the tiny model minutes.
    assert convert.deadline_s > 3600


def test_derived_values_are_filled_in(base_dir: Path):
    recipe = build(base_dir, nodes=2).recipe
    assert recipe.resources.actor_num_nodes == recipe.resources.rollout_num_gpus == 2
    assert recipe.rollout.global_batch_size == 64
    assert recipe.checkpoint.save == recipe.checkpoint.load == str(base_dir / "runs" / "first" / "checkpoints")
    assert recipe.perf.log_probs_max_tokens_per_gpu == recipe.perf.max_tokens_per_gpu
    assert recipe.eval.eval_temperature == recipe.rollout.rollout_temperature
    same = build(base_dir, "--no-colocate", "--rollout-num-gpus", "1", nodes=3).recipe.resources
    assert (same.actor_num_nodes, same.rollout_num_gpus) == (2, 1)


def test_eagle_without_a_draft_model_is_read_as_the_models_own_mtp(base_dir: Path):
    plan = build(base_dir, "--vllm-speculative-config", '{"method":"eagle","num_speculative_tokens":4}')
    assert plan.recipe.engine.vllm["speculative_config"] == {"method": "mtp", "num_speculative_tokens": 4}
    assert any('"eagle" is read as "mtp"' in note for note in plan.notes)
    drafted = build(base_dir, "--vllm-speculative-config", '{"method":"eagle","model":"/draft"}')
    assert drafted.recipe.engine.vllm["speculative_config"]["method"] == "eagle"


def test_what_costs_or_has_no_effect_is_said(base_dir: Path):
    notes = " ".join(build(base_dir, "--overlap-cpu-optimizer-d2h-h2d").notes)
    assert "--use-kl-loss with --kl-loss-coef 0" in notes
    assert "no effect without --optimizer-cpu-offload" in notes
    assert "MTP layer is loaded, exported and synced, but not trained" in notes


def test_the_signal_comes_early_enough_to_save_but_within_the_time_limit(base_dir: Path):
    short = load_cluster("local").model_copy(update={"time_limit_minutes": 4})
    assert build(base_dir, cluster=short).signal_lead_s == 60
    assert build(base_dir).signal_lead_s == 120


def remove(name: str) -> Callable[[Path], None]:
    return lambda base: (base / name).unlink()


def cut(base: Path) -> None:
    os.truncate(base / "tiny-deepseek-r1" / "model-00002-of-00002.safetensors", 100)


def grow(base: Path) -> None:
    with (base / "tiny-deepseek-r1" / "model-00001-of-00002.safetensors").open("ab") as file:
        file.write(b"more")


def garble(base: Path) -> None:
    (base / "tiny-deepseek-r1" / "model-00001-of-00002.safetensors").write_bytes(b"<html>not found</html>")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove("tiny-deepseek-r1/model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors is missing"),
        (cut, "model-00002-of-00002.safetensors (has 100 bytes where|is cut)"),
        (grow, "model-00001-of-00002.safetensors has"),
        (garble, "model-00001-of-00002.safetensors is not a safetensors file"),
        (remove("tiny-deepseek-r1/model.safetensors.index.json"), "its index is missing"),
        (remove("tiny-deepseek-r1/config.json"), "there is no .*/tiny-deepseek-r1/config.json"),
        (remove("tiny-math/train.jsonl"), "--prompt-data: there is no file .*train.jsonl"),
        (remove("tiny-math/eval.jsonl"), "--eval-prompt-data: there is no file .*eval.jsonl"),
    ],
)
def test_an_incomplete_checkpoint_or_data_set_is_named(base_dir: Path, spoil: Callable[[Path], None], message: str):
    spoil(base_dir)
    with pytest.raises(BadInput, match=message):
        build(base_dir)


def test_another_architecture_is_refused(base_dir: Path, change_config: Callable[..., Path]):
    change_config(architectures=["GPT2LMHeadModel"])
    with pytest.raises(BadInput, match="names the architecture GPT2LMHeadModel, which vime does not know"):
        build(base_dir)


def test_a_model_flag_that_differs_from_the_checkpoint_is_refused_with_both_values(base_dir: Path):
    build(base_dir, "--rotary-base", "10000", "--num-layers", "3")
    with pytest.raises(BadInput, match=r"--rotary-base is 1000000, but config.json implies 10000"):
        build(base_dir, "--rotary-base", "1000000")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-steps-per-rollout", "3"), "is 256, which --num-steps-per-rollout 3 does not divide"),
        (("--global-batch-size", "100"), "--global-batch-size 100 does not divide"),
        (("--global-batch-size", "128"), "not --num-steps-per-rollout 4 x --global-batch-size 128"),
        (("--over-sampling-batch-size", "8"), "is less than --rollout-batch-size 32"),
        (("--max-tokens-per-gpu", "none"), "needs --max-tokens-per-gpu"),
        (("--vllm-max-model-len", "8"), "leaves no room for a prompt"),
        (("--mtp-num-layers", "2"), "the checkpoint has 1 MTP layers"),
        (("--expert-model-parallel-size", "2"), "1 ranks cannot hold ETP1 x EP2"),
        (("--actor-num-gpus-per-node", "3", "--expert-model-parallel-size", "3"), "8 experts do not divide by"),
        (("--actor-num-gpus-per-node", "2", "--pipeline-model-parallel-size", "2"), "3 layers do not divide over 2"),
        (("--convert-num-nodes", "2"), "--convert-num-nodes is 2, but the run has 1 nodes"),
        (("--hf-checkpoint", "none"), "--hf-checkpoint is not set"),
    ],
)
def test_a_layout_or_batch_that_does_not_fit_is_refused(base_dir: Path, flags: tuple[str, ...], message: str):
    with pytest.raises(BadInput, match=message):
        build(base_dir, *flags)


def test_more_gpus_than_a_node_holds_are_refused(base_dir: Path):
    with pytest.raises(BadInput, match="--actor-num-gpus-per-node is 9, but nodes of cluster gpus have 8 GPUs"):
        build(base_dir, "--device", "gpu", "--actor-num-gpus-per-node", "9", cluster=GPUS)


def test_the_device_decides_whether_gpus_are_asked_for(base_dir: Path):
    on_cpu = build(base_dir, cluster=GPUS)
    assert (on_cpu.cluster.gpu_request, on_cpu.cluster.gpus_per_node) == ("none", 0)
    assert {stage.gpus_per_node for stage in on_cpu.stages} == {0}
    on_gpu = build(base_dir, "--device", "gpu")
    assert (on_gpu.cluster.gpu_request, on_gpu.cluster.gpus_per_node) == ("gpus-per-node", 1)
    assert stage(on_gpu, "ray-head").gpus_per_node == 1
    assert stage(on_gpu, "train").gpus_per_node == 0


def test_a_missing_base_folder_is_refused(tmp_path: Path):
    with pytest.raises(BadInput, match=r"\$BASE_DIR is not set, and --hf-checkpoint needs it"):
        make_plan(load_recipe("tiny-deepseek-r1"), cluster=load_cluster("local"), run_dir=tmp_path / "run")
    with pytest.raises(BadInput, match="which is not a folder"):
        build(tmp_path / "nowhere")


def test_a_run_folder_that_cannot_be_written_is_refused(base_dir: Path):
    (base_dir / "file").write_text("")
    place = base_dir / "file" / "run"
    with pytest.raises(BadInput, match=f"run folder {place}: .*/file is not a folder, give another with --run-dir"):
        build(base_dir, run_dir=place)
    with pytest.raises(BadInput, match="--run-name is 'a/b'"):
        build(base_dir, run_name="a/b")


def test_planning_writes_nothing(base_dir: Path):
    before = sorted(base_dir.rglob("*"))
    build(base_dir)
    assert sorted(base_dir.rglob("*")) == before

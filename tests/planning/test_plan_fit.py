"""Whether a run fits, the least nodes that do, GPU memory, traffic, and how the plan tells it."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from vime import plan as command
from vime.errors import BadInput
from vime.models.config import ModelConfig
from vime.planning.advice import fullest
from vime.planning.build import Checks, make_plan
from vime.planning.fit import least_nodes, shortages
from vime.planning.needs import as_json, needs_of, render_needs
from vime.planning.request import check_fits
from vime.planning.svg import placement_svg
from vime.planning.traffic import free_space
from vime.recipe.load import load_recipe
from vime.run.plan import Cluster, Plan

TB = 10**12
CHECKS = Checks(inputs=False, run_folder=False)


def cluster(memory: int | None = None, gpu: int | None = None) -> Cluster:
    return Cluster(name="gpus", kind="slurm", gpus_per_node=8, memory_per_node_bytes=memory, gpu_memory_bytes=gpu)


def plan_of(recipe: str, *flags: str, on: Cluster | None = None, **options) -> Plan:
    options = {"base_dir": "/base", **options}
    return make_plan(load_recipe(recipe, flags), cluster=on or cluster(2 * TB), checks=CHECKS, **options)


def least(recipe: str, memory: int, *flags: str):
    config = ModelConfig.from_hf(plan_of(recipe, *flags).model_config_hf)
    return least_nodes(load_recipe(recipe, flags), config, cluster(memory))


def test_a_run_fits_where_its_fullest_node_does():
    needed = fullest(plan_of("deepseek-r1")).host_memory.total_bytes
    assert shortages(plan_of("deepseek-r1", on=cluster(needed))) == ()
    (lack,) = shortages(plan_of("deepseek-r1", on=cluster(needed - 1)))
    assert (lack.where, lack.what, lack.needs_bytes) == ("node 4", "host memory", needed)


def test_programs_that_do_not_fit_beside_the_rest_are_refused_before_the_queue():
    without = fullest(plan_of("deepseek-r1-agent", "--tools", "calculator")).host_memory.total_bytes
    room = cluster(without + 32 * 2**29)
    check_fits(plan_of("deepseek-r1-agent", "--tool-programs", "32", on=room))
    plan = plan_of("deepseek-r1-agent", "--tool-programs", "33", on=room)
    with pytest.raises(BadInput, match="host memory"):
        check_fits(plan)
    assert "33 programs of the tool python at once (--tool-programs), 537 MB each" in command.render(plan)
    fits, other = (least("deepseek-r1-agent", without + 32 * 2**29, "--tool-programs", count) for count in ("32", "33"))
    assert (fits.nodes, fits.flags) == (16, ())
    assert (other.nodes, other.flags) > (16, ())


@pytest.mark.parametrize("memory", [2 * TB, TB, TB * 7 // 10])
def test_the_layout_that_is_found_fits_by_the_plans_own_account(memory: int):
    fit = least("deepseek-r1", memory)
    assert fit is not None
    planned = plan_of("deepseek-r1", *fit.flags, on=cluster(memory), nodes=fit.nodes)
    assert shortages(planned) == ()
    assert fullest(planned).host_memory.total_bytes == fit.host_bytes <= memory


def test_fewer_nodes_fit_with_more_memory_and_the_recipes_own_layout_comes_first():
    few, more = least("deepseek-r1", 2 * TB), least("deepseek-r1", TB)
    assert few is not None
    assert more is not None
    assert (few.nodes, few.flags) == (16, ())
    # Twice the GPUs halve the optimizer's share: data parallelism 2, nothing else changed.
    assert (more.nodes, more.flags) == (32, ())
    assert least("qwen3-4b", TB // 2).nodes == 1


def test_where_nothing_fits_that_is_the_answer():
    assert least("deepseek-r1", 10**11) is None


def test_without_the_memory_of_a_node_there_is_no_answer():
    config = ModelConfig.from_hf(plan_of("qwen3-4b").model_config_hf)
    with pytest.raises(BadInput, match="host memory of a node of cluster gpus is not known: set memory-per-node-bytes"):
        least_nodes(load_recipe("qwen3-4b"), config, cluster())


def test_gpu_memory_is_an_estimate_that_follows_recompute_and_offload():
    def training(*flags: str) -> dict[str, int]:
        memory = plan_of("qwen3-4b", *flags).nodes[0].gpu_memory
        assert memory is not None
        assert memory.estimate is True
        return {item.name: item.bytes for item in memory.training.items}

    plain, whole = training(), training("--recompute-granularity", "none")
    assert whole["activations"] > 5 * plain["activations"]
    assert "recomputed_layer" not in whole
    assert "optimizer" not in training("--optimizer-cpu-offload")
    longer = training("--max-tokens-per-gpu", "18432")
    assert longer["activations"] == pytest.approx(2 * plain["activations"], rel=1e-6)
    assert longer["logits"] == 2 * plain["logits"]


def test_only_the_loss_of_drafts_holds_logits_in_fp32():
    def logits(*flags: str) -> int:
        plan = plan_of("deepseek-r1", *flags)
        memories = [node.gpu_memory for node in plan.nodes if node.gpu_memory is not None]
        return max(item.bytes for memory in memories for item in memory.training.items if item.name == "logits")

    assert logits("--mtp-num-layers", "1") > logits()


def test_an_engine_whose_weights_do_not_fit_is_a_shortage():
    small = plan_of("deepseek-r1", "--rollout-num-gpus-per-engine", "8", "--vllm-data-parallel-size", "1")
    assert any(lack.where == "an engine's rank" for lack in shortages(small))
    memory = small.nodes[0].gpu_memory
    assert memory is not None
    assert memory.kv_cache_tokens == 0
    # 4-bit caches do not exist here; an fp8 one holds twice the tokens of bf16.
    tokens = [
        plan_of("qwen3-4b", *flags).nodes[0].gpu_memory.kv_cache_tokens
        for flags in ((), ("--vllm-kv-cache-dtype", "fp8"))
    ]
    assert tokens[1] == pytest.approx(2 * tokens[0], rel=1e-4)


def test_disk_is_held_against_what_is_still_to_be_written(tmp_path: Path):
    plan = plan_of("qwen3-4b", base_dir=tmp_path, run_dir=tmp_path / "run")
    (space,) = free_space(plan)
    assert dict(space.needs)["checkpoints"] == 3 * needs_of(plan).checkpoint_bytes
    assert space.path == str(tmp_path)
    (tmp_path / "Qwen3-4B_torch_dist").mkdir()
    assert {name for one in free_space(plan) for name, _ in one.needs} == {"checkpoints"}
    assert not dataclasses.replace(space, free_bytes=0).fits


def test_what_is_printed_names_the_shortage_the_way_out_and_every_source():
    plan = plan_of("deepseek-r1", on=cluster(TB))
    text = render_needs(plan, needs_of(plan))
    for said in (
        "no: node 4 needs 1134 GB of host memory and has 1000 GB",
        "the least that fits: --nodes 32",
        "-- --no-use-kl-loss",
        "GPU memory a rank: an estimate",
        "too little by",
    ):
        assert said in text


def test_programs_get_the_same_as_json():
    plan = plan_of("deepseek-r1", on=cluster(TB))
    found = json.loads(json.dumps(as_json(plan, needs_of(plan))))
    assert found["fits"] is False
    assert found["least_nodes"]["nodes"] == 32
    assert found["nodes"][4]["gpu_memory"]["estimate"] is True
    assert sum(found["parameters_per_rank"][1].values()) == 6_341_001_216
    assert {"name", "when", "bytes", "seconds", "why"} == set(found["traffic"][0])


def test_the_placement_map_has_a_cell_a_gpu_and_says_what_the_table_says():
    plan = plan_of("deepseek-r1")
    root = ET.fromstring(placement_svg(plan))
    cells = [each for each in root.iter() if each.get("class") == "cell"]
    texts = [each.text for each in root.iter() if each.tag.endswith("text")]
    assert len(cells) == 128
    assert root.get("role") == "img"
    assert "128 trainer ranks in 4 pipeline stages, 2 engines" in str(root.get("aria-label"))
    for said in ("rank 127", "tp7 cp3 dp0", "ep31 etp0 edp0", "engine 1: dp7 tp7", "node 15"):
        assert said in texts


def test_the_map_is_written_beside_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    file = tmp_path / "map.svg"
    assert command.main(["--recipe", "qwen3-4b", "--placement", "--svg", str(file)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 8
    assert ET.parse(file).getroot().tag.endswith("svg")
    assert command.main(["--recipe", "qwen3-4b", "--svg", str(file)]) == 2
    assert "give --placement with it" in capsys.readouterr().err
    assert command.main(["--placement", "--svg", str(tmp_path / "no" / "map.svg")]) == 2
    assert "--svg" in capsys.readouterr().err


def test_a_plan_for_this_machine_knows_its_memory(base_dir: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--recipe", "tiny-deepseek-r1", "--cluster", "local", "--base-dir", str(base_dir)]
    assert command.main([*words, "--nodes", "auto"]) == 0
    printed = capsys.readouterr().out
    assert "--nodes auto: 1 node" in printed
    assert "yes: the fullest node needs 4 GB of" in printed

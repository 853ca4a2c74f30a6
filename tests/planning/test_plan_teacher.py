"""The teacher in the plan: its engines' places, ports, memory and commands; and every folder and option refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import tiny_hf
from tests.support.plans import bound, plan_of
from vime.errors import BadInput
from vime.launch.binding import port_numbers
from vime.planning.build import Checks, make_plan
from vime.planning.evaluation import Subject, evaluation_plan
from vime.planning.fit import shortages
from vime.planning.layout import divide_slots, nodes_apart, place_engines, place_teacher
from vime.planning.show import render, render_placement
from vime.recipe.load import change, load_recipe
from vime.rollout.command import engine_command
from vime.run.devices import node_slots
from vime.run.plan import Cluster, Evaluation, Plan
from vime.train.placement import Slot, slots

OPD = ("--use-opd", "--opd-teacher", "/t/teacher")
GPUS = Cluster(name="gpus", kind="slurm", gpus_per_node=8, memory_per_node_bytes=2 * 10**12)


def on_gpus(*flags: str, nodes: int, teacher: Path | str = "/t/teacher") -> Plan:
    recipe = load_recipe("qwen3-4b", ["--use-opd", "--opd-teacher", str(teacher), *flags])
    checks = Checks(inputs=False, run_folder=False)
    return make_plan(recipe, cluster=GPUS, nodes=nodes, base_dir="/base", checks=checks)


def places(plan: Plan) -> list[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]]:
    assert plan.teacher is not None
    return [(engine.nodes, engine.gpus) for engine in plan.teacher.engines]


def test_beside_a_trainer_that_shares_its_gpus_the_teacher_has_nodes_of_its_own():
    plan = on_gpus("--opd-teacher-num-gpus", "8", "--opd-teacher-num-gpus-per-engine", "4", nodes=3)
    assert places(plan) == [((2,), ((0, 1, 2, 3),)), ((2,), ((4, 5, 6, 7),))]
    assert plan.recipe.resources.actor_num_nodes == 2
    assert [engine.index for engine in plan.servers] == list(range(10))
    assert plan.nodes[2].engines == (8, 9)
    assert not plan.nodes[2].ranks


def test_on_the_last_node_of_the_engines_it_takes_the_gpus_that_they_leave():
    plan = on_gpus("--no-colocate", "--rollout-num-gpus", "2", "--opd-teacher-num-gpus-per-engine", "4", nodes=2)
    assert places(plan) == [((1,), ((4, 5, 6, 7),))]
    assert {slot for slot in slots(plan) if slot.node == 1} == {Slot(1, gpu) for gpu in (0, 1, 4, 5, 6, 7)}
    assert node_slots(plan, 1) == (0, 1, 4, 5, 6, 7)


def test_on_one_machine_it_has_the_gpus_after_all_others():
    assert places(plan_of("tiny-qwen3", *OPD, nodes=1)) == [((0,), ((1,),))]
    apart = plan_of("tiny-qwen3", *OPD, "--no-colocate", "--rollout-num-gpus", "2", nodes=1)
    assert places(apart) == [((0,), ((3,),))]
    assert places(plan_of("tiny-qwen3", *OPD, nodes=3)) == [((2,), ((0,),))]


@settings(deadline=None, max_examples=60)
@given(
    colocate=st.booleans(),
    engines=st.integers(1, 20),
    count=st.integers(1, 3),
    size=st.sampled_from([1, 2, 4, 8, 16]),
)
def test_no_gpu_has_two_uses_and_no_small_engine_crosses_nodes(colocate: bool, engines: int, count: int, size: int):
    recipe = load_recipe("qwen3-4b", list(OPD))
    options: dict[str, Any] = {"colocate": colocate, "rollout_num_gpus": None if colocate else engines}
    vllm = {"data_parallel_size": max(1, size // 8)}
    teacher = {
        "opd_teacher_num_gpus": count * size, "opd_teacher_num_gpus_per_engine": size, "opd_teacher_vllm": vllm,
    }  # fmt: skip
    recipe = change(recipe, resources=options, teacher=teacher, engine={"rollout_num_gpus_per_engine": 1})
    where = divide_slots(recipe, 8)
    assert where.nodes == recipe.resources.actor_num_nodes + nodes_apart(recipe, 8)
    assert not set(where.teacher) & {*where.actor, *where.rollout}
    assert len(set(where.teacher)) == count * size
    place_engines(recipe, where)
    for engine in place_teacher(recipe, where):
        assert len(engine.nodes) == max(1, size // 8)


def test_ports_are_its_own_and_the_preflight_looks_at_them():
    plan = on_gpus("--opd-teacher-num-gpus", "2", nodes=2)
    assert plan.teacher is not None
    numbers = list(port_numbers(plan))
    assert {engine.port for engine in plan.teacher.engines} <= set(numbers)
    local = plan_of("tiny-qwen3", *OPD, nodes=1)
    assert len({engine.port for engine in local.servers}) == 2


def test_its_engines_load_its_folder_get_no_weights_never_sleep_and_open_no_routes_of_updates():
    plan = on_gpus(
        "--opd-teacher-num-gpus-per-engine", "2", "--opd-teacher-vllm", "gpu_memory_utilization=0.7", nodes=2
    )
    assert plan.teacher is not None
    command = engine_command(plan, bound(2), plan.teacher.engines[0], 0, range(8))
    words, text = command.argv, " ".join(command.argv)
    assert words[:3] == ("-m", "vime.rollout.serve", "/t/teacher")
    assert "--tensor-parallel-size 2" in text
    assert "--served-model-name teacher" in text
    assert "--middleware vime.rollout.fast_answers.GuardedAnswers" in text
    assert "--gpu-memory-utilization 0.7" in text
    assert "--weight-transfer-config" not in text
    assert "--enable-sleep-mode" not in text
    assert "VLLM_SERVER_DEV_MODE" not in command.env
    assert command.env["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert command.model == "teacher"
    policy = engine_command(plan, bound(2), plan.engines[0], 0, range(8))
    assert "--enable-sleep-mode" in policy.argv
    assert policy.model == "policy"


def test_the_plan_shows_it():
    plan = plan_of("tiny-qwen3", *OPD, nodes=2)
    text = render(plan)
    assert "teacher     /t/teacher; engine 1 of 1 GPUs on node 1, DP1 x TP1, up to 256 tokens" in text
    assert "planned without the teacher's size: there is no /t/teacher/config.json here" in text
    assert render_placement(plan).splitlines()[-1].split()[-3:] == ["1", "0", "0"]
    assert "teacher" in [item.name for stage in plan.stages if stage.name == "train" for item in stage.inputs]


def test_an_evaluation_of_the_run_has_no_teacher():
    plan = plan_of("tiny-qwen3", *OPD, nodes=1)
    subject = Subject(Evaluation(weights="/w"), "eval", "/run/eval", plan.model_config_hf)
    evaluation = evaluation_plan(plan.recipe, plan.cluster, 1, subject)
    assert [engine.gpus for engine in evaluation.servers] == [engine.gpus for engine in plan.engines]
    assert not [item for item in evaluation.nodes[0].host_memory.items if "teacher" in item.name]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Student and teacher with the same tokenizer."""
    found = []
    for name in ("tiny-qwen3", "teacher"):
        folder = tiny_hf.write_checkpoint(tmp_path / name, tiny_hf.QWEN3)
        (folder / "tokenizer.json").write_text(tokenizer({"a": 0, "b": 1}))
        found.append(folder)
    return found[0], found[1]


def tokenizer(vocabulary: dict[str, int], added: dict[str, int] | None = None) -> str:
    tokens = [{"id": number, "content": text} for text, number in (added or {}).items()]
    return json.dumps({"model": {"vocab": vocabulary}, "added_tokens": tokens})


def with_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def planned(folders: tuple[Path, Path], *flags: str) -> Plan:
    student, teacher = folders
    # Positions enough for the recipe's 256 tokens.
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        with_config(folder, max_position_embeddings=max(512, config["max_position_embeddings"]))
    return plan_of("tiny-qwen3", "--use-opd", "--opd-teacher", str(teacher), *flags, nodes=1, base=student.parent)


def test_its_weights_are_in_the_memory_of_its_node(folders: tuple[Path, Path]):
    plan = planned(folders)
    assert plan.teacher is not None
    size = sum(path.stat().st_size for path in folders[1].glob("*.safetensors"))
    items = {item.name: item.bytes for item in plan.nodes[0].host_memory.items}
    assert plan.teacher.weights_bytes == items["teacher_weights"] == size > 0
    assert items["teacher_cache"] == 2**30
    assert not [item for item in plan_of("tiny-qwen3", nodes=1).nodes[0].host_memory.items if "teacher" in item.name]


def test_a_teacher_too_large_for_its_gpus_is_a_shortage(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    import vime.planning.teacher as module

    monkeypatch.setattr(module, "_bytes_of", lambda _: 100 * 10**9)
    student, teacher = folders
    with_config(teacher, vocab_size=151936, max_position_embeddings=65536)
    student.rename(student.parent / "elsewhere")
    one = on_gpus(nodes=2, teacher=teacher)
    assert one.teacher is not None
    assert one.teacher.missing == 100 * 10**9 + 5 * 10**9 - 68 * 10**9
    assert "an engine of the teacher" in [lack.where for lack in shortages(one)]
    two = on_gpus("--opd-teacher-num-gpus-per-engine", "2", nodes=2, teacher=teacher)
    assert two.teacher is not None
    assert two.teacher.gpu_memory is not None
    assert {item.name: item.bytes for item in two.teacher.gpu_memory.items}["weights"] == 50 * 10**9
    assert not [lack for lack in shortages(two) if "teacher" in lack.where]


def test_a_teacher_with_another_vocabulary_is_refused_with_both_sizes(folders: tuple[Path, Path]):
    student, teacher = folders
    (teacher / "tokenizer.json").write_text(tokenizer({"a": 0, "c": 1}))
    size = tiny_hf.QWEN3["vocab_size"]
    said = (
        rf"--opd-teacher {teacher} has {size} token ids, and the student {student} {size}, and token '[bc]' has other"
    )
    with pytest.raises(BadInput, match=said):
        planned(folders)
    # The same tokens written in another way are the same.
    (teacher / "tokenizer.json").write_text(tokenizer({"b": 1}, added={"a": 0}))
    planned(folders)
    # Rows beyond the tokenizer's do not matter where the teacher has more of them.
    with_config(teacher, vocab_size=size + 64)
    planned(folders)
    with_config(teacher, vocab_size=size - 1)
    with pytest.raises(BadInput, match=rf"has {size - 1} token ids, and the student .* {size}: the student can sample"):
        planned(folders)
    (teacher / "tokenizer.json").unlink()
    (teacher / "vocab.json").write_text("{}")
    with pytest.raises(BadInput, match=rf"has {size - 1} token ids, and the student .* {size}: give a teacher"):
        planned(folders)


@pytest.mark.parametrize(
    ("config", "flags", "said"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, (), "is quantised, which vLLM does not load on processors"),
        ({"max_position_embeddings": 255}, (), "with 255 positions is too short .* 256 tokens"),
        ({}, ("--opd-teacher-vllm", "max_model_len=100"), "max_model_len of --opd-teacher-vllm 100 positions is too"),
    ],
)
def test_a_folder_that_cannot_teach_is_refused(
    folders: tuple[Path, Path], config: dict[str, Any], flags: tuple[str, ...], said: str
):
    with_config(folders[0], max_position_embeddings=512)
    with_config(folders[1], **{"max_position_embeddings": 512, **config})
    flags = ("--use-opd", "--opd-teacher", str(folders[1]), *flags)
    with pytest.raises(BadInput, match=said):
        plan_of("tiny-qwen3", *flags, nodes=1, base=folders[0].parent)


def test_a_folder_that_is_missing_is_refused_at_a_submission(base_dir: Path):
    recipe = load_recipe("tiny-qwen3", ["--use-opd", "--opd-teacher", "$BASE_DIR/none"])
    from vime.planning.cluster import load_cluster

    with pytest.raises(BadInput, match=rf"--opd-teacher: there is no {base_dir}/none/config.json"):
        make_plan(recipe, cluster=load_cluster("local"), base_dir=base_dir, run_name="r")


PURE = ("--advantage-estimator", "on_policy_distillation")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--use-opd",), "--use-opd needs --opd-teacher"),
        ((*OPD, "--loss-type", "sft_loss"), "--loss-type sft_loss has none"),
        ((*OPD, "--rollout-temperature", "0.8"), "--use-opd needs --rollout-temperature 1, here 0.8"),
        (PURE, "gives no advantage of its own: give --use-opd"),
        ((*OPD, *PURE, "--opd-kl-coef", "0"), "leaves nothing to learn from"),
        ((*OPD, "--rm-type", "none"), "--rm-type is not set"),
        ((*OPD, *PURE, "--rm-type", "none"), "--dynamic-sampling-filter-path looks at rewards"),
        (
            (*OPD, *PURE, "--rm-type", "none", "--dynamic-sampling-filter-path", "none"),
            "--eval-prompt-data looks at rewards",
        ),
        ((*OPD, "--opd-teacher-vllm", "port=3"), "--opd-teacher-vllm port: .* the plan decides the ports"),
        ((*OPD, "--opd-teacher-vllm", "max_num_sqs=3"), "did you mean --vllm-max-num-seqs"),
        ((*OPD, "--opd-teacher-num-gpus", "3", "--opd-teacher-num-gpus-per-engine", "2"), "does not divide the 3 GPUs"),
        ((*OPD, "--opd-teacher-num-gpus-per-engine", "2"), "an engine of the teacher of 2 GPUs with .*tensor parallel"),
        ((*OPD, "--opd-teacher-vllm", "data_parallel_size=2"), "data_parallel_size of --opd-teacher-vllm: 2 does not"),
        ((*OPD, "--opd-type", "sglang"), "unknown option --opd-type: the teacher is always served by vLLM engines"),
        ((*OPD, "--opd-teacher-load", "/t"), "unknown option --opd-teacher-load: here it is --opd-teacher"),
    ],
)
def test_what_distillation_excludes_is_refused(flags: tuple[str, ...], said: str):
    with pytest.raises(BadInput, match=said):
        plan_of("tiny-qwen3", *flags, nodes=4)


def test_too_few_nodes_are_refused_and_options_without_the_switch_are_noted():
    with pytest.raises(BadInput, match="--nodes is 1: the teacher takes 1 nodes, give at least 2"):
        on_gpus(nodes=1)
    notes = plan_of("tiny-qwen3", "--opd-kl-coef", "0.5", "--opd-teacher", "/t", nodes=1).notes
    assert "--opd-kl-coef, --opd-teacher: no effect without --use-opd" in notes


def test_stored_rollouts_are_trained_on_without_a_teacher():
    plan = plan_of("tiny-qwen3", "--use-opd", "--load-debug-rollout-data", "/run/rollouts", nodes=1)
    assert plan.teacher is None

"""The plan of an evaluation: engines alone, on nodes whose shape the profile decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.plans import plan_of
from vime.errors import BadInput
from vime.planning.evaluation import Subject, evaluation_plan, job_cluster
from vime.planning.subject import of_run, preview
from vime.run.plan import Cluster, EvalJob, Evaluation, Plan
from vime.train.exports import evaluates_checkpoint, export_after
from vime.train.phases import evaluates_before

SIXTEEN = {"name": "site", "kind": "slurm", "gpus_per_node": 8, "partition": "big", "cpus_per_node": 96}


def evaluation_of(run: Plan, **cluster: Any) -> Plan:
    subject = Subject(Evaluation(weights="/shared/hf", run_dir=run.run_dir), "e", "/shared/e", run.model_config_hf)
    return evaluation_plan(run.recipe, job_cluster(Cluster(**{**SIXTEEN, **cluster})), None, subject)


@pytest.fixture(scope="module")
def r1() -> Plan:
    return plan_of("deepseek-r1", "--eval-prompt-data", "aime", "/data/aime.jsonl", nodes=16, cluster="example")


def test_it_is_as_small_as_one_engine_and_has_no_trainer(r1):
    plan = evaluation_of(r1)
    size = r1.recipe.engine.rollout_num_gpus_per_engine
    assert (len(plan.nodes), len(plan.engines), plan.trainer_ranks) == (size // 8, 1, ())
    assert [stage.name for stage in plan.stages] == ["preflight", "ray-head", "ray-workers", "evaluate"]
    assert plan.recipe.checkpoint.hf_checkpoint == "/shared/hf"
    items = {item.name for item in plan.nodes[0].host_memory.items}
    assert items == {"engine_processes", "ray"}
    assert plan.cluster.time_limit_minutes < 24 * 60


def test_the_profile_decides_nodes_partition_and_time(r1):
    own = EvalJob(nodes=4, partition="small", time_limit_minutes=50, gpus_per_node=8)
    plan = evaluation_of(r1, eval_job=own)
    assert len(plan.nodes) == 4
    # R1's engines of 64 GPUs are data parallel over tensor-parallel groups of 8.
    (engine,) = plan.engines
    assert (engine.data_parallel_size, engine.tensor_parallel_size) == (4, 8)
    assert (plan.cluster.partition, plan.cluster.time_limit_minutes) == ("small", 50)
    # Those of the other partition's nodes are not this one's.
    assert plan.cluster.cpus_per_node is None


def test_an_engine_that_does_not_fill_the_nodes_is_refused(r1):
    with pytest.raises(BadInput, match=r"engines of 64 GPUs do not fill 1 nodes of 3"):
        evaluation_of(r1, eval_job=EvalJob(nodes=1, gpus_per_node=3))


def test_the_jobs_of_a_run_are_planned_before_it_is_queued():
    flags = ("--eval-job", "--save-interval", "2", "--num-rollout", "9")
    plan = plan_of("tiny-qwen3", *flags, nodes=1)
    assert any(note.startswith("each evaluation is a job of 1 nodes") for note in plan.notes)
    assert preview(plan).stages[-1].name == "evaluate"
    with pytest.raises(BadInput, match="--eval-job with --cluster local: this machine's GPUs"):
        plan_of("tiny-qwen3", *flags, "--device", "gpu", nodes=1)
    with pytest.raises(BadInput, match="--eval-job needs --eval-prompt-data"):
        plan_of("tiny-qwen3", *flags, "--eval-prompt-data", "[]", "--eval-interval", "none", nodes=1)


def test_the_loop_leaves_evaluation_to_the_jobs_and_every_nth_checkpoint_has_one():
    flags = ("--eval-job", "--save-interval", "2", "--eval-job-interval", "2", "--num-rollout", "11")
    plan = plan_of("tiny-qwen3", *flags, nodes=1)
    assert [number for number in range(11) if evaluates_before(plan.recipe, number)] == []
    assert [number for number in (1, 3, 5, 7, 9, 10) if evaluates_checkpoint(plan.recipe, number)] == [3, 7, 10]
    own = export_after(plan, 3)
    assert own is not None
    assert own.own
    assert str(own.path) == f"{plan.run_dir}/evaluations/0000003/weights"
    assert export_after(plan, 1) is None


def test_an_export_of_save_hf_is_what_the_job_evaluates():
    flags = ("--eval-job", "--save-interval", "2", "--save-hf", "/shared/hf-{rollout_id}")
    plan = plan_of("tiny-qwen3", *flags, nodes=1)
    found = export_after(plan, 1)
    assert found is not None
    assert (str(found.path), found.own, found.evaluates) == ("/shared/hf-1", False, True)


def test_one_path_for_several_exports_is_refused():
    with pytest.raises(BadInput, match=r"--save-hf is /shared/hf, and --save-interval 2 saves more than once"):
        plan_of("tiny-qwen3", "--save-interval", "2", "--save-hf", "/shared/hf", nodes=1)


def checkpoint(tmp_path: Path, number: int) -> Plan:
    plan = plan_of("tiny-deepseek-r1", nodes=1, run_dir=tmp_path)
    (tmp_path / "checkpoints" / f"iter_{number:07d}").mkdir(parents=True)
    return plan


def test_a_checkpoint_without_an_hf_folder_is_exported_by_the_job(tmp_path):
    plan = checkpoint(tmp_path, 3)
    subject = of_run(plan, None, None)
    assert subject.evaluation.rollout_id == 3
    assert subject.evaluation.temporary
    made = evaluation_plan(plan.recipe, plan.cluster, 1, subject)
    export = next(stage for stage in made.stages if stage.name == "export")
    assert export.command[-2:] == ("--save", f"{tmp_path}/evaluations/0000003/weights")
    assert "--quantise" not in export.command


def test_an_hf_folder_of_the_checkpoint_is_taken_as_it_is(tmp_path, base_dir):
    plan = checkpoint(tmp_path, 3)
    subject = of_run(plan, 7, str(base_dir / "tiny-qwen3"))
    assert (subject.evaluation.rollout_id, subject.export_from) == (7, None)
    assert subject.evaluation.weights == str(base_dir / "tiny-qwen3")
    assert not subject.evaluation.temporary


def test_a_checkpoint_that_is_gone_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"--checkpoint is 1: .*checkpoints holds 3, and no HF folder of it is there"):
        of_run(checkpoint(tmp_path, 3), 1, None)

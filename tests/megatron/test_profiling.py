"""Profiles of chosen ranks and rollouts with torch's own profiler; what needs a GPU, as far as a text can show it."""

from __future__ import annotations

import gzip
import json
import stat
from pathlib import Path

import pytest
import torch

from tests.support.plans import plan_of
from vime.errors import BadInput
from vime.megatron import profiling
from vime.megatron.profiling import Profiler, memory_snapshot
from vime.recipe.load import change
from vime.run.plan import Plan
from vime.run.profiles import nsys_environment

CHOSEN = ("--profile-ranks", "0,1", "--profile-rollouts", "3")


def profiled(tmp_path: Path, *flags: str) -> Plan:
    return plan_of("tiny-qwen3", *CHOSEN, *flags, run_dir=tmp_path)


def test_the_chosen_rollouts_of_the_chosen_ranks_are_traced(tmp_path):
    plan = profiled(tmp_path)
    assert plan.recipe.profile.profile_ranks == [0, 1]
    for rank, rollout in ((0, 2), (0, 3), (1, 3)):
        with Profiler(plan, rank).during(rollout):
            torch.ones(4) @ torch.ones(4)
    traces = sorted((tmp_path / "profiles").iterdir())
    assert [path.name for path in traces] == ["rollout-0003.rank-000.json.gz", "rollout-0003.rank-001.json.gz"]
    names = {event["name"] for event in json.loads(gzip.decompress(traces[0].read_bytes()))["traceEvents"]}
    assert "aten::dot" in names
    assert stat.S_IMODE(traces[0].stat().st_mode) == 0o600


def test_training_that_fails_leaves_no_trace(tmp_path):
    with pytest.raises(ValueError, match="it"), Profiler(profiled(tmp_path), 0).during(3):
        raise ValueError("it")
    assert not (tmp_path / "profiles").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--profile-ranks", "9", "--profile-rollouts", "3"), "--profile-ranks is 9: the run has 2"),
        (("--profile-ranks", "0", "--profile-rollouts", "99"), "--profile-rollouts is 99: the run has 40"),
        (("--profile-ranks", "0"), "--profile-ranks needs --profile-rollouts"),
        ((*CHOSEN, "--profiler", "nsys"), "--profiler nsys sees GPUs only"),
    ],
)
def test_ranks_and_rollouts_that_are_not_there_are_refused(flags, said):
    with pytest.raises(BadInput, match=said):
        plan_of("tiny-qwen3", *flags)


def test_the_plan_counts_what_the_profiler_holds_on_the_nodes_of_its_ranks():
    flags = ("--profile-ranks", "0,8,9", "--profile-rollouts", "3")
    plan = plan_of("deepseek-r1", *flags, nodes=16, cluster="example")
    held = [{item.name: item.bytes for item in node.host_memory.items}.get("profiler", 0) for node in plan.nodes]
    assert held[0] > 10**9
    assert held[1] == 2 * held[0]
    assert sum(held) == 3 * held[0]


def test_a_rank_under_nsight_systems_is_started_by_it_and_records_what_is_marked(tmp_path):
    plan = profiled(tmp_path)
    recipe = change(plan.recipe, profile={"profiler": "nsys", "profile_rollouts": [3, 5]})
    assert nsys_environment(recipe, str(tmp_path), 2) == {}
    options = nsys_environment(recipe, str(tmp_path), 1)["runtime_env"]["nsight"]
    assert options["o"] == f"{tmp_path}/profiles/rank-001.%p"
    assert (options["capture-range"], options["capture-range-end"]) == ("cudaProfilerApi", "repeat:2")


def test_an_out_of_memory_error_leaves_a_snapshot_and_goes_on(tmp_path, monkeypatch, capsys):
    """The error is made here, and so is the snapshot: a machine without a GPU has neither."""
    monkeypatch.setattr(profiling.torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot"))
    with pytest.raises(torch.OutOfMemoryError), memory_snapshot(str(tmp_path), 7):
        raise torch.OutOfMemoryError("CUDA out of memory")
    (path,) = (tmp_path / "profiles").iterdir()
    assert path.name == "out-of-memory.rank-007.pickle"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert str(path) in capsys.readouterr().out
    with pytest.raises(RuntimeError), memory_snapshot(str(tmp_path), 8):
        raise RuntimeError("another")
    assert len(list((tmp_path / "profiles").iterdir())) == 1

"""Profiles of chosen ranks and rollouts with torch's own profiler; what needs a GPU, as far as a text can show it."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from ray._private.runtime_env.context import RuntimeEnvContext
from ray._private.runtime_env.nsight import NsightPlugin
from ray.runtime_env import RuntimeEnv

from tests.support import patience
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


def test_a_folder_that_nsight_systems_cannot_write_to_is_refused():
    flags = (*CHOSEN, "--profiler", "nsys")
    with pytest.raises(BadInput, match="give a --run-dir without double quotes"):
        plan_of("deepseek-r1", *flags, nodes=16, cluster="example", run_dir='/runs/a "run"')


def test_the_plan_counts_what_the_profiler_holds_on_the_nodes_of_its_ranks():
    flags = ("--profile-ranks", "0,8,9", "--profile-rollouts", "3")
    plan = plan_of("deepseek-r1", *flags, nodes=16, cluster="example")
    held = [{item.name: item.bytes for item in node.host_memory.items}.get("profiler", 0) for node in plan.nodes]
    assert held[0] > 10**9
    assert held[1] == 2 * held[0]
    assert sum(held) == 3 * held[0]


STAND_IN = """#!/bin/sh
# Stands for nsys, which few machines have (tests/megatron/test_nsys.py is about the real one): notes what it is told.
for word; do printf '%s\\n' "$word"; done >> {calls}
"""


def nsys_calls(runtime_env: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words with which Ray starts a worker of this runtime environment under a stand-in for nsys."""
    (folder / "bin").mkdir(parents=True)
    calls = folder / "calls"
    (folder / "bin" / "nsys").write_text(STAND_IN.format(calls=calls))
    (folder / "bin" / "nsys").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    context = RuntimeEnvContext()
    plugin = NsightPlugin(str(folder / "session" / "runtime_resources"))
    env = RuntimeEnv(**runtime_env)
    asyncio.run(plugin.create(None, env, context))
    # The first call is Ray's own look whether nsys takes the options.
    calls.unlink()
    plugin.modify_context([], env, context)
    shell = f"exec {context.py_executable} -c worker"
    subprocess.run(["bash", "-c", shell], check=True, timeout=patience.PROCESS)
    return calls.read_text().splitlines()


def test_a_rank_under_nsight_systems_is_started_by_it_and_records_what_is_marked(tmp_path, run_dir, monkeypatch):
    recipe = change(profiled(tmp_path).recipe, profile={"profiler": "nsys", "profile_rollouts": [3, 5]})
    assert nsys_environment(recipe, str(run_dir), 2) == {}
    environment = nsys_environment(recipe, str(run_dir), 1)
    assert stat.S_IMODE((run_dir / "profiles").stat().st_mode) == 0o700
    words = nsys_calls(environment["runtime_env"], tmp_path / "ray", monkeypatch)
    assert words == [
        "profile", "-t", "cuda,nvtx,cublas,osrt", "-o", f"{run_dir}/profiles/rank-001.%p", "--force-overwrite=true",
        "--sample=none", "--cpuctxsw=none",
        "--capture-range=cudaProfilerApi", "--capture-range-end=repeat:2", "python", "-c", "worker",
    ]  # fmt: skip


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

"""The tool `python` on two nodes of a real Slurm, every part real: the model learns to run programs."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest

from tests.support import patience
from tests.support.person import Person
from tests.support.slurm_cluster import DevCluster, wait_for_end
from vime.observe.samples import read_samples
from vime.run.folder import read_plan
from vime.run.journal import read_events
from vime.run.metrics import read_metrics, series

pytestmark = pytest.mark.e2e

ROLLOUTS = 8


def values(run: Path, name: str) -> list[float]:
    return [value for _, value in series(read_metrics(run), name)]


def test_programs_run_on_both_nodes_pay_off_and_leave_nothing(four_nodes: DevCluster, tools_base: Path) -> None:
    person, run = Person(tools_base), tools_base / "runs" / "programs"
    flags = ("--tools", "python", "--tool-timeout", str(patience.ANSWER), "--num-rollout", str(ROLLOUTS))
    job = person.submits("tiny-tools", 2, run.name, *flags)
    assert wait_for_end(job, patience.LEARNING) == "COMPLETED", read_events(run)[-1:]

    planned = [{item.name: item.bytes for item in node.host_memory.items} for node in read_plan(run).nodes]
    # Of the 64 cores that a node declares eight are the programs', which are two a core.
    assert [node["programs"] for node in planned] == [2 * 8 * 512 * 2**20] * 2
    assert min(values(run, "rollout/programs/node00") + values(run, "rollout/programs/node01")) > 0
    assert sum(values(run, "rollout/tool/python/errors")) == 0

    samples = [sample for path in (run / "rollouts").glob("*.jsonl") for sample in read_samples(path)]
    told = [turn["text"] for sample in samples for turn in sample["turns"] if turn["role"] == "tool"]
    assert told
    assert all(text.strip().isdigit() for text in told)

    rewards = values(run, "rollout/raw_reward")
    assert len(rewards) == ROLLOUTS
    assert fmean(rewards[-2:]) > fmean(rewards[:2]), rewards
    four_nodes.assert_nothing_is_left(job, run)
    assert not any(four_nodes.on_node(node, "pgrep", "-l", "bwrap") for node in range(four_nodes.nodes))

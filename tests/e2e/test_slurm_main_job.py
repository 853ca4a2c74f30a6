"""The main job through a real Slurm, as the README starts it: two nodes, two data-parallel ranks, two engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.main_job import BaseFolder
from tests.support.person import ROOT, Person
from tests.support.slurm_cluster import DevCluster, wait_for_end, wait_for_event, wait_until
from vime.observe.timeline import read_timeline
from vime.run.folder import read_plan
from vime.run.journal import read_events
from vime.run.metrics import read_metrics, series

pytestmark = pytest.mark.e2e

ROLLOUTS = 4
SAVED = 1
"""The run is cancelled once the checkpoint after this rollout is there."""


def submits(person: Person, run: str, *more: str) -> str:
    """The README's command, made short, with more flags of the recipe; the job's id."""
    return person.submits("tiny-deepseek-r1", 2, run, "--num-rollout", str(ROLLOUTS), "--save-interval", "1", *more)


def test_two_nodes_train_are_cancelled_and_go_on_where_they_were(four_nodes: DevCluster, tiny_base: BaseFolder) -> None:
    person, run = Person(tiny_base.path), tiny_base.path / "runs" / "two-nodes"
    job = submits(person, run.name)
    wait_for_event(run, "stage-start", patience.TRAINING, stage="train")
    seen = json.loads(person.types("-m", "vime.status", "--json"))
    assert (seen["run"], seen["state"], seen["job"], seen["stage"]) == (run.name, "running", job, "train")
    tracker = Path(read_plan(run).recipe.checkpoint.save or "") / "latest_checkpointed_iteration.txt"
    argv = [sys.executable, "-m", "vime.logs", "-f"]
    with subprocess.Popen(argv, env=person.env, cwd=ROOT, stdout=subprocess.PIPE, text=True) as follower:
        wait_until(
            lambda: tracker.exists() and int(tracker.read_text()) >= SAVED, patience.TRAINING, lambda: tail_of(run)
        )
        person.types("-m", "vime.cancel")
        said, _ = follower.communicate(timeout=patience.PROCESS)
    assert "train/node00 rollout 0/4" in said
    assert wait_for_end(job, patience.JOB) == "CANCELLED"
    four_nodes.assert_nothing_is_left(job, run)
    assert "SIGTERM received" not in (run / "logs" / "train" / "node00.log").read_text()
    saved = int(tracker.read_text())
    before = read_metrics(run)

    again = submits(person, run.name)
    assert wait_for_end(again, patience.TRAINING) == "COMPLETED", tail_of(run)
    stages = [(event.kind, event.stage) for event in read_events(run) if event.kind in ("stage-start", "stage-skip")]
    started = [stage for kind, stage in stages if kind == "stage-start"]
    # The first start made what the second one found and verified.
    assert started.count("convert") <= 1
    assert [stage for stage in started if stage not in ("cast", "convert")] == [
        *("preflight", "rehearsal", "ray-head", "ray-workers", "train"),
        *("preflight", "rehearsal", "ray-head", "ray-workers", "train", "report"),
    ]
    log = (run / "logs" / "train" / "node00.log").read_text()
    assert f"first rollout {saved + 1}" in log
    after = read_metrics(run)
    assert [step for step, values in after.items() if "rollout/raw_reward" in values] == list(range(ROLLOUTS))
    # What was trained before the checkpoint stands as it was.
    trained = [{name: after[step][name] for name in before[step]} for step in range(saved + 1)]
    assert trained == [before[step] for step in range(saved + 1)]
    plan = read_plan(run)
    assert [(rank.dp, rank.node) for rank in plan.trainer_ranks] == [(0, 0), (1, 1)]
    assert [engine.nodes for engine in plan.engines] == [(0,), (1,)]
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    four_nodes.assert_nothing_is_left(again, run)


def test_an_engine_on_a_node_of_its_own_generates_one_rollout_ahead(
    four_nodes: DevCluster, tiny_base: BaseFolder
) -> None:
    person, run = Person(tiny_base.path), tiny_base.path / "runs" / "ahead"
    job = submits(person, run.name, "--no-colocate", "--rollout-num-gpus", "1")
    assert wait_for_end(job, patience.TRAINING) == "COMPLETED", tail_of(run)
    plan = read_plan(run)
    assert [rank.node for rank in plan.trainer_ranks] == [0]
    assert [engine.nodes for engine in plan.engines] == [(1,)]
    behind = [value for _, value in series(read_metrics(run), "rollout/staleness_max")]
    assert behind == [0.0] + [1.0] * (ROLLOUTS - 1)
    spans = [span for span in read_timeline(run) if span.track == "driver"]
    training = [span for span in spans if span.name == "train"]
    generating = [span for span in spans if span.name == "generate"]
    assert len(training) == len(generating) == ROLLOUTS
    for trained, ahead in zip(training[:-1], generating[1:], strict=True):
        assert ahead.start < trained.end
    four_nodes.assert_nothing_is_left(job, run)


def tail_of(run: Path) -> str:
    log = run / "logs" / "train" / "node00.log"
    told = log.read_text(errors="replace")[-3000:] if log.exists() else ""
    return f"{read_events(run)[-1:]}\n{told}"

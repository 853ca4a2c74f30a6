"""Hangs of the trainer's ranks are found, and the rank that is at fault is named."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import patience
from tests.support.plans import plan_of
from tests.support.single import free_port
from vime.errors import Cause
from vime.megatron.parallel import COLLECTIVE_S
from vime.run.plan import Binding, BoundNode
from vime.train import pulse
from vime.train.causes import RayFacts, explain
from vime.train.deadlines import PhaseDeadlines
from vime.train.pulse import Beat, Pulse, RankStuck, Seen, judge

LIMITS = {"silent_s": 120.0, "stuck_s": 600.0}


def seen(*, phase: str = "train", marks: int = 10, still: float = 1.0, waits: bool = True, age: float = 2.0) -> Seen:
    return Seen(Beat(7, phase, marks, still, "all_reduce (distributed_c10d.py:1)", waits), age)


def test_all_is_well() -> None:
    assert judge({0: seen(), 1: seen(marks=3, still=599.0)}, **LIMITS) is None


def test_before_the_first_sign_nobody_is_late() -> None:
    assert judge({}, **LIMITS) is None


def test_a_silent_rank_is_at_fault_whatever_the_others_wait_for() -> None:
    found = judge({0: seen(still=700.0), 1: seen(age=121.0, phase="train/log_probs"), 2: seen()}, **LIMITS)
    assert found is not None
    rank, text = found
    assert rank == 1
    assert "no sign of life for 121 s in phase train/log_probs" in text


def test_a_silent_rank_is_found_between_calls_too() -> None:
    found = judge({0: seen(phase="", age=130.0)}, **LIMITS)
    assert found is not None
    assert "waiting for the driver" in found[1]


@pytest.mark.parametrize(
    ("ranks", "culprit"),
    [
        ([seen(still=700.0), seen(still=650.0, marks=9), seen(still=650.0)], 1),
        ([seen(still=700.0), seen(still=700.0, waits=False), seen(still=700.0)], 1),
        ([seen(still=700.0), seen(still=700.0)], None),
        ([seen(phase="", still=9000.0), seen(still=700.0)], None),
    ],
    ids=["least-far", "the-only-one-that-does-not-wait", "a-link", "others-have-ended"],
)
def test_where_nobody_moves_the_one_behind_is_at_fault(ranks: list[Seen], culprit: int | None) -> None:
    found = judge(dict(enumerate(ranks)), **LIMITS)
    assert found is not None
    assert found[0] == culprit
    assert "no rank made progress" in found[1]
    assert "phase train" in found[1]


def test_one_rank_that_moves_is_enough() -> None:
    assert judge({0: seen(still=5000.0), 1: seen(still=3.0)}, **LIMITS) is None


def test_a_checkpoint_may_take_longer_than_a_step() -> None:
    assert judge({0: seen(phase="save", still=1500.0), 1: seen(phase="save", still=1500.0)}, **LIMITS) is None


def test_collective_operations_end_before_the_phases_and_after_the_watch() -> None:
    limits = PhaseDeadlines()
    phases = (limits.setup, limits.train, limits.save, limits.sync)
    assert limits.silent < limits.stuck < COLLECTIVE_S < min(phases)


def test_the_account_names_rank_node_and_phase() -> None:
    account = explain(ExceptionGroup("tasks", [RankStuck("rank 1: … in phase train", 1, 4)]), RayFacts())
    assert (account.cause, account.nodes, account.rank) == (Cause.CRASH, (4,), 1)
    assert "phase train" in account.text


def test_a_lost_node_explains_a_silent_rank() -> None:
    account = explain(RankStuck("rank 1", 1, 4), RayFacts(lost={4: "its raylet does not answer"}))
    assert account.cause is Cause.NODE_FAILURE


# -- with processes --

RANK = """
import sys, time
import torch, torch.distributed as dist
from datetime import timedelta
from vime.system.progress import Progress
from vime.system.rendezvous import group_store
from vime.train import pulse
rank, master, port, hangs = (int(word) for word in sys.argv[1:])
pulse.BEAT_S = 0.2
progress = Progress()
store = group_store("127.0.0.1", master, rank, 2, timedelta(seconds=60), b"key")
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
pulse.Heart(rank, progress, ("127.0.0.1", port), b"key")
for step in range(100000):
    with progress.during("train"):
        if hangs == rank and step == 20:
            time.sleep(1000)
        dist.all_reduce(torch.ones(1))
        time.sleep(0.05)
"""


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts two ranks in a group, of which one may hang by itself; gives (watch, processes, folder of logs)."""
    monkeypatch.setattr(pulse, "BEAT_S", 0.2)
    monkeypatch.setattr(pulse, "STACKS_S", 3.0)
    plan = plan_of("tiny-qwen3", nodes=1, run_dir=tmp_path)
    first = plan.trainer_ranks[0]
    two = tuple(first.model_copy(update={"rank": rank}) for rank in range(2))
    watch = Pulse(
        plan.model_copy(update={"trainer_ranks": two}),
        Binding(nodes=(BoundNode(index=0, host="here", address="127.0.0.1"),)),
        b"key",
        silent_s=4.0,
        stuck_s=8.0,
    )
    ranks: list[subprocess.Popen[bytes]] = []

    def start(hangs: int = -1) -> tuple[Pulse, list[subprocess.Popen[bytes]], Path]:
        master = free_port()
        for rank in range(2):
            words = [str(word) for word in (rank, master, watch.place[1], hangs)]
            with open(tmp_path / f"rank-{rank}.log", "wb") as log:
                ranks.append(subprocess.Popen([sys.executable, "-c", RANK, *words], stderr=log))
        return watch, ranks, tmp_path

    yield start
    watch.close()
    for rank in ranks:
        rank.kill()
        rank.wait()


def _beating(watch: Pulse) -> None:
    end = time.monotonic() + patience.GROUP
    while len(watch._look(0.0)) < 2:
        assert time.monotonic() < end, "no sign of life"
        time.sleep(0.1)


def test_a_stopped_process_is_found_while_the_other_waits_for_it_in_a_collective(watched: Any) -> None:
    watch, ranks, folder = watched()
    _beating(watch)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    with pytest.raises(RankStuck, match=r"rank 1: gave no sign of life for \d+ s in phase train") as raised:
        asyncio.run(asyncio.wait_for(watch.watch(), patience.PROCESS))
    assert raised.value.rank == 1
    assert "all_reduce" in (folder / "rank-0.log").read_text()
    assert (folder / "rank-1.log").read_text() == ""


def test_a_rank_that_does_not_come_to_a_collective_is_found(watched: Any) -> None:
    watch, _, folder = watched(hangs=1)
    _beating(watch)
    with pytest.raises(RankStuck, match=r"no rank made progress for .* in phase train") as raised:
        asyncio.run(asyncio.wait_for(watch.watch(), patience.PROCESS))
    assert raised.value.rank == 1
    assert "all_reduce" in (folder / "rank-0.log").read_text()
    assert "<string>" in (folder / "rank-1.log").read_text()

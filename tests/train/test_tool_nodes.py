"""Programs of the tool `python` on a Ray of two nodes: where they run, and what becomes of those of a lost node."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.plans import plan_of
from vime.agents.sandbox import Limits, Outcome
from vime.node.ray_process import pin_resource
from vime.run.folder import write_binding, write_plan
from vime.run.plan import Binding, BoundNode, Plan
from vime.run.tokens import make_tokens
from vime.train.tool_nodes import ToolNodes

pytestmark = pytest.mark.e2e

LIMITS = Limits(seconds=patience.ANSWER, memory=256 * 2**20)
CORES = sorted(os.sched_getaffinity(0))
PLACES = 3


def plan_in(run_dir: Path, *flags: str, nodes: int = 2) -> Plan:
    """A plan of these nodes, all of them this machine, as a run folder has it."""
    plan = plan_of("tiny-tools", "--tools", "python", *flags, nodes=nodes, run_dir=run_dir)
    write_plan(plan)
    here = tuple(BoundNode(index=node, host=socket.gethostname(), address="127.0.0.1") for node in range(nodes))
    write_binding(run_dir, Binding(nodes=here, port_offset=0))
    make_tokens(run_dir)
    return plan


@pytest.fixture(scope="module")
def second() -> Iterator[Callable[[], None]]:
    """A Ray of two nodes, joined; a function that kills the second one."""
    import ray
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="vt-") as folder, pytest.MonkeyPatch.context() as patch:
        # Ray's socket paths must stay short.
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_enable_worker_prestart", "0")
        cluster = Cluster()
        try:
            for node in range(2):
                more = {"include_dashboard": False} if node == 0 else {}
                resources = {pin_resource(node): 1}
                made = cluster.add_node(num_cpus=1, resources=resources, dashboard_agent_listen_port=0, **more)
            ray.init(address=cluster.address, namespace="vime", log_to_driver=False)
            yield lambda: cluster.remove_node(made, allow_graceful=False)
        finally:
            ray.shutdown()
            cluster.shutdown()


def started(nodes: ToolNodes, source: str, count: int) -> list[asyncio.Task[Outcome]]:
    return [asyncio.create_task(nodes.run(source, LIMITS)) for _ in range(count)]


def alive(word: str) -> bool:
    """True if a process of this machine has the word in its command line."""
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in line.read_bytes():
                return True
    return False


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + patience.PROCESS
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


async def test_programs_are_spread_over_the_nodes_and_more_than_there_is_room_for_wait(second, tmp_path) -> None:
    nodes = ToolNodes(plan_in(tmp_path, "--tool-programs", str(PLACES)))
    await nodes.check()
    slow = started(nodes, "import time; time.sleep(2); print('slow')", 2 * PLACES + 1)
    await until(lambda: nodes.loads() == [PLACES, PLACES])
    assert await asyncio.gather(*slow) == [Outcome("slow\n")] * len(slow)
    assert nodes.loads() == [0, 0]
    metrics = nodes.take_metrics()
    assert metrics.pop("rollout/programs_repeated") == 0
    assert sorted(metrics) == ["rollout/programs/node00", "rollout/programs/node01"]
    assert sum(metrics.values()) == 2 * PLACES + 1
    assert min(metrics.values()) >= PLACES
    assert not any(nodes.take_metrics().values())


@pytest.mark.skipif(len(CORES) < 2, reason="one core cannot be divided")
async def test_programs_have_the_cores_that_are_set_aside_for_them(second, tmp_path) -> None:
    nodes = ToolNodes(plan_in(tmp_path, "--tool-cores", "1"))
    await nodes.check()
    told = await nodes.run("import os; print(*os.sched_getaffinity(0))", LIMITS)
    assert told.output.split() == [str(CORES[-1])]


async def test_a_call_that_is_given_up_leaves_no_program_on_its_node(second, tmp_path) -> None:
    nodes = ToolNodes(plan_in(tmp_path))
    await nodes.check()
    word = "given-up-5d1"
    program = (
        f"import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(999) # {word}'])"
    )
    [call] = started(nodes, program, 1)
    await until(lambda: alive(word))
    call.cancel()
    await until(lambda: not alive(word))
    assert nodes.loads() == [0, 0]


async def test_programs_of_a_lost_process_or_node_begin_again_on_another_and_are_counted(second, tmp_path) -> None:
    import ray

    nodes = ToolNodes(plan_in(tmp_path))
    await nodes.check()
    slow = started(nodes, "import time; time.sleep(10); print('slow')", 2)
    await until(lambda: nodes.loads() == [1, 1])
    ray.kill(nodes._nodes[0]._actor, no_restart=False)
    assert await asyncio.gather(*slow) == [Outcome("slow\n")] * len(slow)
    assert nodes.take_metrics()["rollout/programs_repeated"] == 1

    nodes = ToolNodes(plan_in(tmp_path))
    await nodes.check()
    slow = started(nodes, "import time; time.sleep(10); print('slow')", 2)
    await until(lambda: nodes.loads() == [1, 1])
    await asyncio.to_thread(second)
    assert await asyncio.gather(*slow) == [Outcome("slow\n")] * len(slow)
    assert nodes.take_metrics()["rollout/programs_repeated"] == 1
    assert (await nodes.run("print(6 * 7)", LIMITS)).output == "42\n"

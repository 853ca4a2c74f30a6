"""`python -m vime.node.ray_node --run DIR --head|--worker`: Ray on one node, according to the plan.

The head and the first worker also report when the GCS answers and when every node of the plan is alive.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

from vime.errors import Cause, Crash, DeadlineExceeded, VimeError
from vime.node.network import listening_ports
from vime.node.ray_process import RayProcesses, gcs_address, ray_parameters
from vime.node.usage import UsageWriter
from vime.planning import ports as planned_ports
from vime.run.folder import read_binding, read_plan
from vime.run.messages import report
from vime.run.plan import Binding, Plan
from vime.run.tokens import RAY_TOKEN, read_token, token_path

POLL_S = 0.5
MEMORY_THRESHOLD = "0.98"
"""Share of memory above which Ray kills workers. High, since CPU Adam fills nodes on purpose."""
_ALIVE = 0
_HEAD_PORTS = ("gcs",)
_NODE_PORTS = (
    "node_manager", "object_manager", "runtime_env", "dashboard_agent", "dashboard_agent_grpc", "metrics_export",
)  # fmt: skip


def ray_environment(run_dir: str) -> dict[str, str]:
    """Variables of every Ray process; they name the token's file, not the token."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path(run_dir, RAY_TOKEN)),
        "RAY_memory_usage_threshold": MEMORY_THRESHOLD,
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        # Draining would wait half a minute for nothing: the nodes end together with the run.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's exporter would serve metrics to everyone, on every interface.
        "RAY_enable_metrics_collection": "0",
        # The GCS would keep the history of every call, which nobody asks for.
        "RAY_task_events_report_interval_ms": "0",
        "RAY_DEDUP_LOGS": "0",
        # Ray would give its actors, which are the run itself, the lowest priority on the node.
        "RAY_worker_niceness": "0",
        # The plan assigns GPUs to ranks; Ray's own order is shuffled.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def live_addresses(address: str) -> set[str]:
    """Addresses of the Ray nodes that the GCS calls alive. Raises the client's errors while the GCS is away."""
    from ray._raylet import GcsClient

    nodes = GcsClient(address=address).get_all_node_info(timeout=5)
    return {node.node_manager_address for node in nodes.values() if node.state == _ALIVE}


def wait_nodes(
    address: str,
    wanted: Collection[str],
    deadline_s: float,
    *,
    on_missing: Callable[[list[str]], None] = lambda missing: None,
) -> None:
    """Wait until the nodes at all wanted addresses are alive, according to the GCS at `address`.

    Raises DeadlineExceeded with the missing addresses.
    """
    deadline, told = time.monotonic() + deadline_s, None
    while True:
        try:
            missing = sorted(set(wanted) - live_addresses(address))
        except Exception as error:  # noqa: BLE001 -- the client's errors have no common base; a GCS that is not up yet raises them
            missing = [f"the GCS at {address} ({type(error).__name__})"]
        if not missing:
            return
        if missing != told:
            on_missing(missing)
            told = missing
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"Ray nodes are missing after {deadline_s:.0f} s: {', '.join(missing)}")
        time.sleep(POLL_S)


def names_of(binding: Binding, missing: list[str]) -> list[str]:
    """Host names of the missing addresses."""
    hosts = {node.address: node.host for node in binding.nodes}
    return [f"{hosts[item]} ({item})" if item in hosts else item for item in missing]


def check_ports(plan: Plan, binding: Binding, node: int) -> None:
    """Raise VimeError if one of Ray's ports was taken since preflight; Ray would only report that it died."""
    busy, ports = listening_ports(), planned_ports.moved(plan.ports, binding.port_offset)
    names = _NODE_PORTS + (_HEAD_PORTS if node == 0 else ())
    for name in names:
        if (port := getattr(ports, name)) in busy:
            raise VimeError(f"port {port} ({name}) is taken on {binding.nodes[node].host} by another process")


class Readiness(threading.Thread):
    """Reports once the awaited nodes are alive; ends this process if they are late."""

    def __init__(self, plan: Plan, binding: Binding, waits_for: list[int], deadline_s: float) -> None:
        super().__init__(daemon=True)
        self._plan, self._binding, self._waits_for, self._deadline_s = plan, binding, waits_for, deadline_s
        self.failed: Cause | None = None

    def run(self) -> None:
        nodes = [self._binding.nodes[i] for i in self._waits_for]
        try:
            wait_nodes(
                gcs_address(self._plan, self._binding),
                [node.address for node in nodes],
                self._deadline_s,
                on_missing=lambda missing: report("waiting", missing=names_of(self._binding, missing)),
            )
            report("ready", nodes=[node.host for node in nodes])
        except DeadlineExceeded as error:
            self.failed = error.cause
            print(f"error: {error}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)


def serve(plan: Plan, binding: Binding, node: int, waits_for: list[int], deadline_s: float) -> int:
    """Run Ray on this node to its end, and report once the awaited nodes are alive."""
    temp_dir = Path(os.environ.get("TMPDIR", "/tmp")) / "ray"
    os.environ.update(ray_environment(plan.run_dir))
    # By default glibc makes eight heaps a core, for threads in turn, and each grows to what a thread once needed: so
    # does a rank, for hundreds of rollouts. A profile's own value counts.
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")
    # Import here, in one thread: Ray reads its authentication settings on import, and a second thread that imports
    # it at the same time would find it half loaded.
    import ray  # noqa: F401

    parameters = ray_parameters(plan, binding, node, temp_dir=str(temp_dir), cpus=len(os.sched_getaffinity(0)))
    readiness = Readiness(plan, binding, waits_for, deadline_s)
    if waits_for:
        readiness.start()
    UsageWriter(plan.run_dir, node).start()

    def tell(crash: Crash) -> None:
        report("failure", cause=crash.cause.name, text=str(crash), nodes=[node], rank=int(os.environ["RANK"]))

    code = RayProcesses(parameters, deadline_s, tell).run()
    return code if readiness.failed is None else int(readiness.failed)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vime.node.ray_node", description="Ray on one node of a run.")
    parser.add_argument("--run", required=True, help="run folder with plan.json and binding.json")
    role = parser.add_mutually_exclusive_group(required=True)
    role.add_argument("--head", action="store_true")
    role.add_argument("--worker", action="store_true")
    args = parser.parse_args(argv)
    try:
        plan, binding = read_plan(args.run), read_binding(args.run)
        read_token(args.run, RAY_TOKEN)  # fails unless it exists and is private
        node, rank = int(os.environ["VIME_NODE"]), int(os.environ["RANK"])
        check_ports(plan, binding, node)
        stage = next(stage for stage in plan.stages if stage.name == ("ray-head" if args.head else "ray-workers"))
        waits_for = [0] if args.head else (list(range(len(plan.nodes))) if rank == 0 else [])
        return serve(plan, binding, node, waits_for, stage.deadline_s)
    except VimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.cause)


if __name__ == "__main__":
    sys.exit(main())

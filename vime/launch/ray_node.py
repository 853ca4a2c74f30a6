"""`python -m vime.launch.ray_node --run DIR --head|--worker`: Ray on one node, as the plan says.

It runs `ray start --block`; the head and the first worker also report when the GCS answers and when every node of the
plan is alive.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

from vime.errors import DeadlineExceeded, VimeError
from vime.launch.network import listening_ports
from vime.launch.reports import report
from vime.launch.rundir import read_secret, secret_path
from vime.launch.supervise import adopt_orphans, kill_tree
from vime.planning import ports as planned_ports
from vime.planning.io import read_binding, read_plan
from vime.planning.memory import object_store_bytes
from vime.planning.types import Binding, Plan

POLL_S = 0.5
MEMORY_THRESHOLD = "0.98"
"""Ray's own killer starts above this share of memory; CPU Adam fills nodes on purpose."""
_ALIVE = 0
_STARTED = b"Ray runtime started"
_DEAD = re.compile(rb"(\w+) \[exit code=(-?\d+)\]")
_HEAD_PORTS = ("gcs", "ray_client")
_NODE_PORTS = (
    "node_manager", "object_manager", "runtime_env", "dashboard_agent", "dashboard_agent_grpc", "metrics_export",
)  # fmt: skip


def pin_resource(node: int) -> str:
    """The custom resource that only this logical node offers."""
    return f"slurm_rank_{node}"


def gcs_address(plan: Plan, binding: Binding) -> str:
    """Where every Ray process of the run finds its head."""
    return f"{binding.nodes[0].address}:{plan.ports.gcs + binding.port_offset}"


def logical_cpus(plan: Plan, node: int, present: int) -> int:
    """CPUs that Ray may give away: those that are there, and at least what the node's slots ask for.

    They place actors and limit nothing, so a small machine may offer more than it has.
    """
    per_slot = plan.recipe.cluster.num_cpus_per_rank or 1
    return max(present, plan.nodes[node].gpus * per_slot + 1)


def ray_arguments(plan: Plan, binding: Binding, node: int, *, temp_dir: str, cpus: int) -> list[str]:
    """Arguments of `ray start` on a logical node; the first one is the head."""
    here, ports = binding.nodes[node], planned_ports.moved(plan.ports, binding.port_offset)
    resources = {pin_resource(node): 1}
    argv = [
        f"--node-ip-address={here.address}",
        f"--num-cpus={logical_cpus(plan, node, cpus)}",
        f"--num-gpus={plan.nodes[node].gpus}",
        f"--resources={json.dumps(resources)}",
        f"--labels=vime-node={node}",
        f"--node-manager-port={ports.node_manager}",
        f"--object-manager-port={ports.object_manager}",
        f"--min-worker-port={ports.worker_first}",
        f"--max-worker-port={ports.worker_last}",
        f"--runtime-env-agent-port={ports.runtime_env}",
        f"--dashboard-agent-listen-port={ports.dashboard_agent}",
        f"--dashboard-agent-grpc-port={ports.dashboard_agent_grpc}",
        f"--metrics-export-port={ports.metrics_export}",
        f"--object-store-memory={object_store_bytes(plan.recipe)}",
        "--disable-usage-stats",
        "--log-style=record",
        "--log-color=false",
        "--block",
    ]
    if node == 0:
        head = ["--head", f"--port={ports.gcs}", "--include-dashboard=false", f"--temp-dir={temp_dir}"]
        return [*head, f"--ray-client-server-port={ports.ray_client}", *argv]
    # A worker's folder is the head's path, on the worker's own disk.
    return [f"--address={gcs_address(plan, binding)}", *argv]


def ray_environment(run_dir: str) -> dict[str, str]:
    """Variables of every Ray process; the token is named by its file, so it stands in no environment."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(secret_path(run_dir, "ray_token")),
        "RAY_memory_usage_threshold": MEMORY_THRESHOLD,
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        # Draining a node that ends with the whole run would wait half a minute for nothing.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        # Ray would put its actors, which are the run itself, behind everything else on the node.
        "RAY_worker_niceness": "0",
        # The plan says which GPU a rank takes; Ray's own order is shuffled.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def live_addresses(address: str) -> set[str]:
    """Addresses of the Ray nodes that the GCS says are alive. Raises what the GCS client raises while it is away."""
    from ray._raylet import GcsClient

    nodes = GcsClient(address=address).get_all_node_info(timeout=5)
    return {node.node_manager_address for node in nodes.values() if node.state == _ALIVE}


def wait_nodes(
    address: str,
    wanted: Collection[str],
    deadline_s: float,
    *,
    ended: Callable[[], bool] = lambda: False,
    on_missing: Callable[[list[str]], None] = lambda missing: None,
) -> None:
    """Returns when the nodes at all wanted addresses are alive, asking the GCS at `address`.

    `ended` tells that waiting has no sense any more. Raises DeadlineExceeded naming the missing addresses.
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
        if ended() or time.monotonic() > deadline:
            raise DeadlineExceeded(f"Ray nodes are missing after {deadline_s:.0f} s: {', '.join(missing)}")
        time.sleep(POLL_S)


def names_of(binding: Binding, missing: list[str]) -> list[str]:
    """Missing addresses as hosts."""
    hosts = {node.address: node.host for node in binding.nodes}
    return [f"{hosts[item]} ({item})" if item in hosts else item for item in missing]


def check_ports(plan: Plan, binding: Binding, node: int) -> None:
    """Raises VimeError where somebody has taken a port of Ray's since preflight; Ray would only say that it died."""
    busy, ports = listening_ports(), planned_ports.moved(plan.ports, binding.port_offset)
    names = _NODE_PORTS + (_HEAD_PORTS if node == 0 else ())
    for name in names:
        if (port := getattr(ports, name)) in busy:
            raise VimeError(f"port {port} ({name}) is taken on {binding.nodes[node].host} by another process")


class RayStart:
    """`ray start --block` to its end; again when it gives up before it has started.

    Ray gives a raylet 30 s to register, which libraries that come from a busy file system for the first time exceed.
    Nodes that slowed each other down give up together, so each waits a random time before it tries again, longer every
    time (exponential backoff with jitter).
    """

    def __init__(self, argv: list[str], deadline_s: float, backoff_s: float = 15.0) -> None:
        self._argv, self._deadline = argv, time.monotonic() + deadline_s
        self._backoff = backoff_s
        self._process: subprocess.Popen[bytes] | None = None
        self._started, self._stopping = False, False
        self._dead: list[str] = []
        self.code: int | None = None
        """Exit code of the last try, when there is no other."""

    def run(self) -> int:
        """Blocks. The caller's process adopts what a try leaves, so it must have no other children."""
        adopt_orphans()
        code = 0
        while not self._stopping:
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            reader = threading.Thread(target=self._pass_on_output, args=(self._process,), daemon=True)
            reader.start()
            code = self._process.wait()
            # What a try leaves may hold the pipe open.
            reader.join(1.0)
            if self._started or code == 0 or self._stopping or time.monotonic() > self._deadline:
                if self._dead:
                    # Ray's own last line does not say which of its processes was the first to go.
                    print(f"error: {', '.join(self._dead)} ended, and Ray with it", file=sys.stderr, flush=True)
                break
            kill_tree(os.getpid(), signal.SIGKILL)
            self._pause(f"ray start ended with {code} before it had started")
        self.code = code
        return code

    def _pause(self, why: str) -> None:
        """Waits its random time, at most until the deadline. A signal handler may run here: no lock is held."""
        pause = random.uniform(0, max(0.0, min(self._backoff, self._deadline - time.monotonic())))
        self._backoff *= 2
        print(f"{why}: again in {pause:.0f} s", file=sys.stderr, flush=True)
        until = time.monotonic() + pause
        while time.monotonic() < until and not self._stopping:
            time.sleep(0.1)

    def stop(self) -> None:
        """Ray ends in order when it gets the signal itself."""
        self._stopping = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def _pass_on_output(self, process: subprocess.Popen[bytes]) -> None:
        """Copies what is said to this process's output, and sees whether Ray says that it has started."""
        assert process.stdout is not None
        for line in process.stdout:
            os.write(1, line)
            self._started = self._started or _STARTED in line
            if match := _DEAD.search(line):
                self._dead.append(f"{match[1].decode()} (exit code {int(match[2])})")


def serve(plan: Plan, binding: Binding, node: int, waits_for: list[int], deadline_s: float) -> int:
    """Runs Ray on this node to its end, reporting when the nodes it waits for are alive."""
    temp_dir = Path(os.environ.get("TMPDIR", "/tmp")) / "ray"
    os.environ.update(ray_environment(plan.run_dir))
    cpus = len(os.sched_getaffinity(0))
    argv = ray_arguments(plan, binding, node, temp_dir=str(temp_dir), cpus=cpus)
    ray = RayStart([sys.executable, "-m", "ray.scripts.scripts", "start", *argv], deadline_s)
    signal.signal(signal.SIGTERM, lambda number, frame: ray.stop())
    if not waits_for:
        return ray.run()
    running = threading.Thread(target=ray.run, daemon=True)
    running.start()
    try:
        wait_nodes(
            gcs_address(plan, binding),
            [binding.nodes[i].address for i in waits_for],
            deadline_s,
            ended=lambda: ray.code is not None,
            on_missing=lambda missing: report("waiting", missing=names_of(binding, missing)),
        )
        report("ready", nodes=[binding.nodes[i].host for i in waits_for])
        late = 0
    except DeadlineExceeded as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        ray.stop()
        late = int(error.cause)
    running.join()
    return ray.code or late


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vime.launch.ray_node", description="Ray on one node of a run.")
    parser.add_argument("--run", required=True, help="run folder with plan.json and binding.json")
    role = parser.add_mutually_exclusive_group(required=True)
    role.add_argument("--head", action="store_true")
    role.add_argument("--worker", action="store_true")
    args = parser.parse_args(argv)
    try:
        plan, binding = read_plan(args.run), read_binding(args.run)
        read_secret(args.run, "ray_token")  # is it there, and private?
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

"""Ray's processes on one node: `ray start --block` without the parts that a run does not use.

Loading the command takes as much processor time as all that it starts, and it adds idle servers (dashboard, autoscaler,
remote drivers). It fails if a raylet takes more than 30 s to register, which happens when many nodes load from one file
system at once. So vime builds Ray's own `Node`. That is no public interface: Ray's version is pinned, and
tests/e2e/test_slurm_ray.py starts it.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vime.errors import Crash, DeadlineExceeded, VimeError
from vime.planning import ports as planned_ports
from vime.planning.memory import object_store_bytes
from vime.run.plan import Binding, Plan

POLL_S = 0.5
HELPERS_NICE, LOGS_NICE = 19, 10
"""Niceness of Ray's agents and log monitor: they load as long as all else together, and nothing waits for them."""
TAIL_LINES, TAIL_BYTES = 40, 16384
"""Size of the tail read from one of Ray's logs."""
STOPPED = 128 + signal.SIGTERM


class Terminated(BaseException):
    """This process was asked to end. Not an `Exception`: Ray retries after those."""


def pin_resource(node: int) -> str:
    """Custom Ray resource that only this logical node offers."""
    return f"slurm_rank_{node}"


def gcs_address(plan: Plan, binding: Binding) -> str:
    """Address at which every Ray process of the run finds its head."""
    return f"{binding.nodes[0].address}:{plan.ports.gcs + binding.port_offset}"


def logical_cpus(plan: Plan, node: int, present: int) -> int:
    """CPUs that Ray may assign: those present, but at least as many as the node's slots request.

    They serve placement only and limit nothing, so a small machine may offer more than it has.
    """
    per_slot = plan.recipe.resources.num_cpus_per_rank or 1
    return max(present, plan.nodes[node].gpus * per_slot + 1)


def ray_parameters(plan: Plan, binding: Binding, node: int, *, temp_dir: str, cpus: int) -> dict[str, Any]:
    """Arguments of Ray's RayParams for a logical node; node 0 is the head.

    A raylet's helpers use ports of the plan, so that it need not wait for their announcements.
    """
    here, ports = binding.nodes[node], planned_ports.moved(plan.ports, binding.port_offset)
    parameters: dict[str, Any] = {
        "node_ip_address": here.address,
        "node_name": here.address,
        "num_cpus": logical_cpus(plan, node, cpus),
        "num_gpus": plan.nodes[node].gpus,
        "resources": {pin_resource(node): 1},
        "labels": {"vime-node": str(node)},
        "object_store_memory": object_store_bytes(plan.recipe),
        "node_manager_port": ports.node_manager,
        "object_manager_port": ports.object_manager,
        "min_worker_port": ports.worker_first,
        "max_worker_port": ports.worker_last,
        "runtime_env_agent_port": ports.runtime_env,
        "dashboard_agent_listen_port": ports.dashboard_agent,
        "metrics_agent_port": ports.dashboard_agent_grpc,
        "metrics_export_port": ports.metrics_export,
        "include_dashboard": False,
        "include_log_monitor": False,
        "no_monitor": True,
    }
    if node == 0:
        return {**parameters, "gcs_server_port": ports.gcs, "temp_dir": temp_dir}
    # A worker's folder has the head's path, but on the worker's own disk.
    return {**parameters, "gcs_address": gcs_address(plan, binding)}


class RayProcesses:
    """Ray on this node, from start to end. Main thread only: Ray's processes end with the thread that started them."""

    def __init__(
        self, parameters: dict[str, Any], deadline_s: float, on_end: Callable[[Crash], None] = lambda crash: None
    ) -> None:
        """`on_end` is called when a process of Ray has ended, before the others are ended too, which takes seconds."""
        self._parameters, self._deadline, self._on_end = parameters, time.monotonic() + deadline_s, on_end
        self._node: Any = None

    def run(self) -> int:
        """Block until a process of Ray ends, which ends the others, or a signal arrives. Returns an exit code."""
        signal.signal(signal.SIGTERM, _stop)
        try:
            self._start()
            print("Ray is up on this node", flush=True)
            while not (dead := self._node.dead_processes()):
                time.sleep(POLL_S)
            crash = Crash(f"{self._last_words(dead)} ended, and Ray with it")
            self._on_end(crash)
            raise crash
        except VimeError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return int(error.cause)
        except Terminated:
            return STOPPED
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if self._node is not None:
                self._node.kill_all_processes(check_alive=False, allow_graceful=True)

    def _start(self) -> None:
        from ray._private import ray_constants, services
        from ray._private.node import Node
        from ray._private.parameter import RayParams
        from ray._private.utils import write_ray_address
        from ray._raylet import DASHBOARD_AGENT_LISTEN_PORT_NAME, persist_port

        processes, interpreter = self, services._build_python_executable_command_memory_profileable

        def patient(component: str, *args: Any, **options: Any) -> list[str]:
            nice = LOGS_NICE if component == ray_constants.PROCESS_TYPE_LOG_MONITOR else HELPERS_NICE
            return ["nice", "-n", str(nice), *interpreter(component, *args, **options)]

        # Ray starts only its helpers through this function, neither the raylet nor the run's own processes.
        services._build_python_executable_command_memory_profileable = patient

        class RunNode(Node):
            def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
                # Without the dashboard only one module of this server is left: usage statistics, which are off.
                self._webui_url = ""

            def start_ray_processes(self) -> None:
                processes._node = self
                # The raylet waits at most 15 s for its helper to write this file. Written here instead, since `Node`
                # does not pass on the known port.
                port = processes._parameters["dashboard_agent_listen_port"]
                persist_port(self._session_dir, self._node_id, DASHBOARD_AGENT_LISTEN_PORT_NAME, port)
                super().start_ray_processes()
                processes._wait_registered()
                # Started last: it sends the lines of actors to the driver, and there are none before.
                self.start_log_monitor()

        head = "gcs_address" not in self._parameters
        node = RunNode(RayParams(**self._parameters), head=head, shutdown_at_exit=False, spawn_reaper=True)
        # Lets `ray status`, run by a person, find the head.
        write_ray_address(node.gcs_address, node.get_temp_dir_path())

    def _wait_registered(self) -> None:
        """Wait until the GCS knows the raylet.

        Raises Crash if a process was killed, VimeError if one has ended otherwise or the deadline has passed.
        """
        node = self._node
        while not any(found.hex() == node._node_id for found in node.get_gcs_client().get_all_node_info(timeout=30)):
            if dead := node.dead_processes():
                killed = any(process.returncode < 0 for _, process in dead)
                text = f"{self._last_words(dead)} ended before Ray had started"
                raise Crash(text) if killed else VimeError(text)
            if time.monotonic() > self._deadline:
                raise DeadlineExceeded("the raylet did not register with the GCS in time")
            time.sleep(0.1)

    def _last_words(self, dead: list[tuple[str, Any]]) -> str:
        """Names of ended processes; copies their last lines to this process's log, since theirs are node-local."""
        for name, _ in dead:
            for path in sorted(Path(self._node.get_logs_dir_path()).glob(f"{name}.*")):
                with path.open("rb") as file:
                    file.seek(max(0, path.stat().st_size - TAIL_BYTES))
                    lines = file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
                for line in lines:
                    print(f"{path.name}: {line}", file=sys.stderr, flush=True)
        return ", ".join(f"{name} (exit code {process.returncode})" for name, process in dead)


def _stop(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated

"""One engine on one of its nodes: starts, watches and stops a vLLM server and its child processes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vime.errors import DeadlineExceeded, VimeError
from vime.rollout.command import EngineCommand, engine_command, is_teachers
from vime.rollout.guard import KEY_VARIABLE, NAME_HEADER, NAME_VARIABLE
from vime.run.cores import divide
from vime.run.devices import VISIBLE
from vime.run.environment import resolve
from vime.run.last_words import telling_line
from vime.run.plan import Binding, Plan
from vime.system import shared_memory
from vime.system.bounded_log import cut_back
from vime.system.private import private_folder
from vime.system.processes import PARENT_VARIABLE, group_runs

POLL_SECONDS = 0.25
GRACE_SECONDS = 15.0
"""Time from the first signal until a server that is still running is killed."""
KILL_SECONDS = 15.0
_SEGMENTS = ("psm_", "vllm_")
"""Name prefixes of an engine's shared memory."""
_PROBE_SECONDS = 120.0
_TAIL_BYTES = 16384


class _Stranger(OSError):
    """Another server answered on this engine's port."""


class EngineFailed(VimeError):
    """An engine's server exited, or answered its first request wrong."""


class EngineServer:
    """One engine's process on its node number `position`; position 0 serves, the others follow without a port.

    Call `start` on a thread that lives as long as the engine: the kernel ends the server when that thread ends.
    """

    def __init__(self, plan: Plan, binding: Binding, engine_index: int, position: int, api_key: str) -> None:
        engine = plan.servers[engine_index]
        whose = "the teacher's engine" if is_teachers(plan, engine) else "engine"
        self.name = f"{whose} {engine_index} on node {engine.nodes[position]}"
        cpus = _cpus_of_engine(plan, binding, engine_index, position)
        self.command: EngineCommand = engine_command(plan, binding, engine, position, cpus, os.environ.get(VISIBLE))
        node = engine.nodes[position]
        self.log = Path(plan.run_dir) / "logs" / "engines" / f"engine-{engine_index}-node{node:02d}.log"
        self._key = api_key
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: str | None = None
        self._server_name = ""
        self._started_ns = 0

    @property
    def pid(self) -> int | None:
        """Process id of the server and of its process group; None before `start` and after `stop`."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the server, with its output in the engine's log file. Call `wait_ready` next."""
        if self._process is not None:
            raise RuntimeError(f"{self.name} is already running")
        private_folder(self.log.parent)
        # A private temporary folder, because vLLM keeps its processes' sockets and rendezvous files there.
        self._scratch = tempfile.mkdtemp(prefix="vime-")
        env = {**os.environ, **resolve(self.command.env, os.environ)}
        env |= {KEY_VARIABLE: self._key, PARENT_VARIABLE: str(os.getpid()), "TMPDIR": self._scratch}
        self._server_name = secrets.token_hex(8)
        env |= {NAME_VARIABLE: self._server_name}
        env |= {"VLLM_RPC_BASE_PATH": self._scratch, "PYTHONUNBUFFERED": "1"}
        self._started_ns = time.time_ns()
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._process = subprocess.Popen(
                [sys.executable, *self.command.argv],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        finally:
            os.close(descriptor)

    def wait_ready(self, deadline_s: float) -> str:
        """Wait until the server answers a real request; returns its address, on a follower at once.

        Raises EngineFailed when the process ends first or answers wrong, DeadlineExceeded after `deadline_s` seconds.
        """
        end = time.monotonic() + deadline_s
        last = "it never accepted a connection"
        while True:
            if (code := self.poll()) is not None:
                raise EngineFailed(f"{self.name} exited with {code} before it was ready: {self.last_words()}")
            if not self.command.serves:
                return self.command.url
            left = end - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded(
                    f"{self.name} was not ready within {deadline_s:.0f} s: {last}; its last words: {self.last_words()}"
                )
            try:
                self._probe(min(left, _PROBE_SECONDS))
                return self.command.url
            except urllib.error.HTTPError as error:
                last = f"it answered {error.code}: {error.read(200).decode(errors='replace')}"
            except (OSError, http.client.HTTPException) as error:
                last = f"{type(error).__name__}: {error}"
            time.sleep(POLL_SECONDS)

    def poll(self) -> int | None:
        """Exit code of the server process; None while it runs. Keeps the server's log bounded."""
        if self._process is None:
            raise RuntimeError(f"{self.name} was not started")
        cut_back(self.log)
        return self._process.poll()

    def stop(self, grace_s: float = GRACE_SECONDS) -> None:
        """End the server and every process it started: SIGTERM, then after `grace_s` seconds SIGKILL to its group.

        Raises DeadlineExceeded if a process survives that.
        """
        if self._process is None:
            return
        process, self._process = self._process, None
        if process.poll() is None:
            process.terminate()
        if not _group_ended(process, time.monotonic() + grace_s):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if not _group_ended(process, time.monotonic() + KILL_SECONDS):
                raise DeadlineExceeded(f"{self.name}: process group {process.pid} outlived its kill")
        shared_memory.remove_unused(self._started_ns, _SEGMENTS)
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    def last_words(self) -> str:
        """The most informative line of the log's tail."""
        try:
            with open(self.log, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except FileNotFoundError:
            return f"nothing in {self.log}"
        return f"{telling_line(lines)} ({self.log})"

    def _probe(self, timeout: float) -> None:
        """Send a request with token ids. Raises EngineFailed for a wrong number of tokens or log-probs."""
        wanted = 2
        body = {
            "model": self.command.model,
            "token_ids": [1, 2, 3],
            "sampling_params": {"max_tokens": wanted, "temperature": 0, "logprobs": 0, "ignore_eos": True},
        }
        request = urllib.request.Request(
            f"{self.command.url}/inference/v1/generate",
            data=json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"},
        )
        # No proxy: the cluster's web proxy must not see requests of a node to itself.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=timeout) as response:
            if response.headers.get(NAME_HEADER) != self._server_name:
                raise _Stranger(f"another server answers at {self.command.url}")
            answer = json.load(response)
        choice = answer["choices"][0]
        logprobs: list[dict[str, Any]] = choice["logprobs"]["content"]
        if len(choice["token_ids"]) != wanted or len(logprobs) != wanted:
            raise EngineFailed(f"{self.name} answered its first request wrong: {json.dumps(choice)[:300]}")


def _group_ended(process: subprocess.Popen[bytes], end: float) -> bool:
    """True if the process and every member of its group end before the monotonic time `end`."""
    while True:
        process.poll()  # reaps it, so that the group can become empty
        if not group_runs(process.pid):
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)


def _cpus_of_engine(plan: Plan, binding: Binding, engine_index: int, position: int) -> Sequence[int]:
    """This engine's share of the cores available to this process, without those of programs; engines on one host
    divide them."""
    cpus = divide(plan.recipe.agent, sorted(os.sched_getaffinity(0))).others
    host = binding.nodes[plan.servers[engine_index].nodes[position]].host
    here = [
        (engine.index, place)
        for engine in plan.servers
        for place, node in enumerate(engine.nodes)
        if binding.nodes[node].host == host
    ]
    mine, shares = here.index((engine_index, position)), len(here)
    if len(cpus) < shares:
        return [cpus[mine % len(cpus)]]
    return cpus[len(cpus) * mine // shares : len(cpus) * (mine + 1) // shares]

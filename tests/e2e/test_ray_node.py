"""Ray's own processes on this machine: which there are, how they end, and a raylet that takes its time."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.launch_stub import make_plan, ray_stages
from vime.errors import Cause
from vime.node.network import listening_ports
from vime.run.folder import write_binding
from vime.run.last_words import telling_line
from vime.run.messages import REPORT_FD
from vime.run.plan import Binding, BoundNode
from vime.run.tokens import make_tokens
from vime.system.processes import descendants, kill_tree

pytestmark = pytest.mark.e2e
# An address and ports for each test, away from those of runs that may be under way on this machine.
PLACES = itertools.count()


@dataclass
class Head:
    process: subprocess.Popen[bytes]
    log: Path
    reports: int

    def wait_ready(self, seconds: float) -> None:
        """Until the head has reported that the GCS answers."""
        os.set_blocking(self.reports, False)
        said = b""

        def ready() -> bool:
            nonlocal said
            with contextlib.suppress(BlockingIOError):
                said += os.read(self.reports, 65536)
            assert self.process.poll() is None, self.log.read_text()
            return b'"ready"' in said

        wait(ready, seconds)

    def below(self) -> dict[int, str]:
        """Command lines of the processes below it."""
        found = {}
        for pid in descendants(self.process.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def raylet(self) -> int:
        """Pid of the raylet, once it is there."""
        found: list[int] = []

        def there() -> bool:
            found[:] = [pid for pid, line in self.below().items() if re.match(r"\S*/raylet/raylet ", line)]
            return bool(found)

        wait(there, patience.PROCESS, 0.02)
        return found[0]


def wait(condition: Callable[[], bool], seconds: float, pause: float = 0.1) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(pause)


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    run_dir = tmp_path / "run"
    make_plan(run_dir, ray_stages(run_dir, 1))
    place = next(PLACES)
    write_binding(
        run_dir,
        Binding(
            nodes=(BoundNode(index=0, host="here", address=f"127.0.0.{9 + place}"),), port_offset=600 + 100 * place
        ),
    )
    make_tokens(run_dir)
    log = tmp_path / "log"
    reports, theirs = os.pipe()
    # Ray's socket paths must stay short.
    scratch = Path(f"/tmp/vime-test-{os.getpid()}")
    scratch.mkdir(mode=0o700)
    env = {**os.environ, "VIME_NODE": "0", "RANK": "0", "TMPDIR": str(scratch), REPORT_FD: str(theirs)}
    argv = [sys.executable, "-m", "vime.node.ray_node", "--run", str(run_dir), "--head"]
    process = subprocess.Popen(argv, env=env, pass_fds=[theirs], stdout=log.open("wb"), stderr=subprocess.STDOUT)
    os.close(theirs)
    try:
        yield Head(process, log, reports)
    finally:
        kill_tree(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        # Agents of a raylet that was killed: in a run the node's supervisor ends them.
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if str(scratch).encode() in entry.read_bytes():
                    os.kill(int(entry.parent.name), signal.SIGKILL)
        os.close(reports)
        subprocess.run(["rm", "-r", str(scratch)], check=True)


def ends_with_everything(head: Head, seconds: float) -> int:
    below = head.below()
    code = head.process.wait(seconds)
    # A raylet's agents see for themselves that it is gone; in a run the node's supervisor ends them.
    wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), patience.PROCESS)
    return code


def test_it_starts_what_a_run_needs_and_ends_it_when_told_to(head: Head) -> None:
    head.wait_ready(patience.GROUP)
    wait(lambda: "log_monitor.py" in " ".join(head.below().values()), patience.PROCESS)
    lines = " ".join(head.below().values())
    for needed in ("gcs_server", "raylet/raylet", "dashboard/agent.py", "runtime_env/agent/main.py", "log_monitor.py"):
        assert needed in lines
    for idle in ("dashboard/dashboard.py", "monitor.py --logs-dir", "ray.util.client.server"):
        assert idle not in lines
    # The agent serves no metrics, which its exporter would do for everyone, on every interface.
    assert "--disable-metrics-collection" in lines
    exporter = re.search(r"--metrics-export-port=(\d+)", lines)
    assert exporter is not None
    assert int(exporter[1]) not in listening_ports()
    begin = time.monotonic()
    head.process.send_signal(signal.SIGTERM)
    assert ends_with_everything(head, patience.NOTICE) == 128 + signal.SIGTERM
    assert time.monotonic() - begin < patience.MOMENT


def test_a_raylet_that_dies_is_named_and_ends_the_others(head: Head) -> None:
    head.wait_ready(patience.GROUP)
    os.kill(head.raylet(), signal.SIGKILL)
    assert ends_with_everything(head, patience.NOTICE) == Cause.CRASH
    assert telling_line(head.log.read_text().splitlines()) == "error: raylet (exit code -9) ended, and Ray with it"


def test_a_raylet_that_dies_as_soon_as_it_is_there_is_named_at_once(head: Head) -> None:
    """It may have registered by then."""
    os.kill(head.raylet(), signal.SIGKILL)
    assert ends_with_everything(head, patience.NOTICE) == Cause.CRASH
    assert telling_line(head.log.read_text().splitlines()).startswith("error: raylet (exit code -9) ended")


def test_a_raylet_may_take_more_than_half_a_minute(head: Head) -> None:
    """Ray's own command gives it 30 s."""
    raylet = head.raylet()
    os.kill(raylet, signal.SIGSTOP)
    time.sleep(35)
    assert head.process.poll() is None, head.log.read_text()
    os.kill(raylet, signal.SIGCONT)
    head.wait_ready(patience.GROUP)


def test_it_ends_when_told_to_before_ray_has_started(head: Head) -> None:
    os.kill(head.raylet(), signal.SIGSTOP)
    head.process.send_signal(signal.SIGTERM)
    assert ends_with_everything(head, patience.NOTICE) == 128 + signal.SIGTERM


DRIVER = """
import sys, time
from vime.run.folder import read_binding, read_plan
from vime.train.__main__ import connect
connect(read_plan(sys.argv[1]), read_binding(sys.argv[1]))
print("connected", flush=True)
time.sleep(3600)
"""


def test_a_driver_that_is_asked_to_end_does_so_without_a_stack_trace(head: Head, tmp_path: Path) -> None:
    head.wait_ready(patience.GROUP)
    argv = [sys.executable, "-c", DRIVER, str(tmp_path / "run")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as driver:
        try:
            assert driver.stdout is not None
            assert any(line == "connected\n" for line in driver.stdout)
            driver.send_signal(signal.SIGTERM)
            said, _ = driver.communicate(timeout=patience.NOTICE)
        finally:
            driver.kill()
    assert driver.returncode == -signal.SIGTERM, said
    assert said == ""

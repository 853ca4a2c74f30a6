"""Ray's start on a node, with a program that behaves like `ray start --block`; real Ray is in tests/e2e."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_stub import make_plan, preflight

from vime.errors import VimeError
from vime.launch import ray_node
from vime.launch.failure import telling_line
from vime.planning.types import Binding, BoundNode

DRIVER = """
import signal, sys
from vime.launch.ray_node import RayStart
ray = RayStart([sys.executable, sys.argv[1]], float(sys.argv[2]), backoff_s=0.5)
signal.signal(signal.SIGTERM, lambda number, frame: ray.stop())
sys.exit(ray.run())
"""
FAILS_ONCE = """
import pathlib, subprocess, sys, time
tries = pathlib.Path({tries!r})
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
if len(tries.read_text()) == 1:
    subprocess.Popen(["setsid", "--fork", "sleep", {mark!r}])
    sys.exit("The current node timed out during startup")
print("Ray runtime started.", flush=True)
{then}
"""


def start(
    tmp_path: Path, then: str, *, deadline_s: float = 60, mark: str = "61", errors: int | None = None
) -> subprocess.Popen[str]:
    program = tmp_path / "ray.py"
    program.write_text(FAILS_ONCE.format(tries=str(tmp_path / "tries"), then=then, mark=mark))
    argv = [sys.executable, "-c", DRIVER, str(program), str(deadline_s)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors, text=True)


def test_a_start_that_ray_gives_up_is_tried_again_without_what_it_left(tmp_path: Path) -> None:
    process = start(tmp_path, "sys.exit(7)", mark="61.25")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 7, "an end after the start is not tried again"
    assert "Ray runtime started." in said
    assert (tmp_path / "tries").read_text() == "xx"
    assert not subprocess.run(["pgrep", "-f", "sleep 61[.]25"], capture_output=True, text=True).stdout


def test_a_process_of_rays_that_dies_is_named_last(tmp_path: Path) -> None:
    """In the words of `ray start --block`, to either stream."""
    then = (
        "print('ERR scripts.py:1290 -- Some Ray subprocesses exited unexpectedly:', file=sys.stderr)\n"
        "print('ERR scripts.py:87 -- raylet [exit code=-9]', file=sys.stderr)\n"
        "print('ERR scripts.py:1300 -- Remaining processes will be killed.', file=sys.stderr)\n"
        "sys.exit(1)"
    )
    process = start(tmp_path, then, errors=subprocess.STDOUT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert telling_line(said.splitlines()) == "error: raylet (exit code -9) ended, and Ray with it"


def test_after_the_deadline_there_is_no_other_try(tmp_path: Path) -> None:
    process = start(tmp_path, "pass", deadline_s=0)
    assert process.wait(60) == 1
    assert (tmp_path / "tries").read_text() == "x"


def test_being_told_to_end_reaches_ray(tmp_path: Path) -> None:
    process = start(tmp_path, "time.sleep(60)")
    assert process.stdout is not None
    assert "Ray runtime started.\n" in iter(process.stdout.readline, "")
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) != 0
    assert time.monotonic() - begin < 20
    assert (tmp_path / "tries").read_text() == "xx"


def test_a_port_that_is_taken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tmp_path, [preflight(tmp_path, 1)])
    nodes = tuple(BoundNode(index=i, host=f"node0{i + 1}", address=f"10.0.0.{i + 1}") for i in range(2))
    binding = Binding(nodes=nodes, port_offset=100)
    monkeypatch.setattr(ray_node, "listening_ports", lambda: {plan.ports.gcs + 100})
    with pytest.raises(VimeError, match=f"port {plan.ports.gcs + 100} \\(gcs\\) is taken on node01"):
        ray_node.check_ports(plan, binding, 0)
    ray_node.check_ports(plan, binding, 1)

"""A run of stub stages on the development cluster, a fault in it, and the expected end."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.support import patience
from tests.support.launch_stub import make_plan, preflight, service, stub
from tests.support.slurm_cluster import DevCluster, wait_for_end, wait_for_event, wait_until
from vime.run.journal import Event, read_events
from vime.run.plan import Stage
from vime.schedulers.submission import submit
from vime.slurm import queue as slurm

SAVED = "weights and optimizer of rollout 1"

TRAINING = """
import os, pathlib, time
folder = pathlib.Path({folder!r})
if (folder / "iter_1").exists():
    from vime.run.messages import report
    report("result")
    print("goes on", flush=True)
    raise SystemExit
folder.mkdir(parents=True)
(folder / ".iter_1").write_text({saved!r})
os.rename(folder / ".iter_1", folder / "iter_1")
print("training", flush=True)
{then}
from vime.run.messages import report
report("result")
"""
"""Saves a checkpoint and then does something; in a later start it finds the checkpoint and ends well."""

HANG = "time.sleep(3600)"


def node_name(node: int) -> str:
    return f"node{node + 1:02d}"


class Scene:
    """One run on a cluster. Whatever the test breaks is mended when the scene closes."""

    def __init__(self, cluster: DevCluster, run_dir: Path) -> None:
        self.cluster, self.nodes = cluster, cluster.nodes
        self.run_dir = run_dir
        self.job = ""
        self._mend: list[Callable[[], object]] = []

    @property
    def last_node(self) -> int:
        """A node that is not the batch host."""
        return self.nodes - 1

    # -- what runs --

    def start(self, *stages: Stage, nodes: int | None = None, **options: Any) -> str:
        """Submits a run of these stages after preflight; the job's id."""
        nodes = nodes or self.nodes
        # Several runs may start at once on few cores.
        first = preflight(self.run_dir, nodes).model_copy(update={"deadline_s": patience.GROUP})
        plan = make_plan(self.run_dir, [first, *stages], nodes=nodes, kind="slurm", **options)
        self.job = submit(plan)
        return self.job

    def services(self, nodes: int | None = None) -> list[Stage]:
        """Stubs in the place of Ray."""
        others = range(1, nodes or self.nodes)
        return [service("ray-head"), *([service("ray-workers", nodes=others)] if others else [])]

    def training(self, then: str = HANG) -> Stage:
        folder = str(self.run_dir / "checkpoints")
        return stub(
            "train", TRAINING.format(folder=folder, saved=SAVED, then=then), deadline_s=patience.JOB, tells_end=True
        )

    def start_training(self, *, then: str = HANG, nodes: int | None = None, **options: Any) -> None:
        """A run whose training has saved a checkpoint."""
        self.start(*self.services(nodes), self.training(then), nodes=nodes, **options)
        self.until_said("train", "training")

    def until_said(self, stage: str, text: str, seconds: float = patience.JOB) -> None:
        log = self.run_dir / "logs" / stage / "node00.log"
        wait_until(lambda: log.exists() and text in log.read_text(), seconds, lambda: str(self.events()[-3:]))

    def have_said(self, stage: str, text: str) -> int:
        """How many tasks of a stage have said this."""
        logs = (self.run_dir / "logs" / stage).glob("node*.log")
        return sum(text in log.read_text() for log in logs)

    # -- what breaks --

    def fault(self, action: str, node: int, *, mend: str | None = None) -> None:
        self.cluster.call("fault", action, node_name(node))
        if mend is not None:
            self._mend.append(lambda: self.cluster.call("fault", mend, node_name(node)))

    def on_node(self, node: int, *words: str, mend: Sequence[str] = ()) -> str:
        said = self.cluster.on_node(node, *words)
        if mend:
            self._mend.append(lambda: self.cluster.on_node(node, *mend))
        return said

    def kill(self, node: int, name: str) -> None:
        """SIGKILL to the processes of this name on a node."""
        pids = [line.split()[0] for line in self.processes(node) if line.split()[1] == name]
        assert pids, f"no {name} on {node_name(node)}: {self.processes(node)}"
        self.cluster.on_node(node, "kill", "-9", *pids)

    def processes(self, node: int) -> list[str]:
        return self.cluster.on_node(node, "ps", "-eww", "-o", "pid=,comm=,args=").splitlines()

    def share_disk(self, folder: Path, image: Path) -> None:
        """A small disk of its own at this folder, the same on every node and here."""
        with image.open("wb") as file:
            file.truncate(16 * 2**20)
        folder.mkdir()
        subprocess.run(["mkfs.ext4", "-q", image], check=True, timeout=patience.PROCESS)
        subprocess.run(["mount", "-o", "loop,errors=remount-ro", image, folder], check=True, timeout=patience.PROCESS)
        self._mend.append(lambda: subprocess.run(["umount", folder], check=True, timeout=patience.PROCESS))
        device = subprocess.run(["findmnt", "-no", "SOURCE", folder], capture_output=True, text=True).stdout.strip()
        for node in range(self.nodes):
            self.on_node(node, "mount", device, str(folder), mend=("umount", str(folder)))

    def slow_link(self, node: int, rate: str) -> None:
        """Both directions of a node's link, the way in at the other end of its cable."""
        shape = ("root", "tbf", "rate", rate, "burst", "64k", "latency", "400ms")
        undo = ("tc", "qdisc", "del", "dev", "eth0", "root")
        self.on_node(node, "tc", "qdisc", "add", "dev", "eth0", *shape, mend=undo)
        far = f"vdc{node + 1}"
        subprocess.run(["tc", "qdisc", "add", "dev", far, *shape], check=True, timeout=patience.PROCESS)
        self._mend.append(lambda: subprocess.run(["tc", "qdisc", "del", "dev", far, "root"], timeout=patience.PROCESS))

    def listen(self, node: int, ports: Sequence[int]) -> None:
        """Takes ports on a node."""
        code = f"import socket, sys; s = [socket.create_server(('', port)) for port in {list(ports)}]"
        code += "; print('on', flush=True); sys.stdin.read()"
        argv = [*self.cluster.enter(node), sys.executable, "-c", code]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        # It ends with its input: a signal would end nsenter, and not what that started on the node.
        self._mend += [process.wait, process.stdin.close]
        assert process.stdout.readline() == b"on\n"

    # -- how it ends --

    def events(self) -> list[Event]:
        return read_events(self.run_dir)

    def ends(
        self,
        cause: str,
        *,
        stage: str | None,
        node: int | None,
        within_s: float,
        text: str = "",
        requeued: bool = False,
        count: int = 1,
    ) -> Event:
        """The last word of the run's first start comes in time and is right; `count` says which last word that is."""
        begin = time.monotonic()
        end = wait_for_event(self.run_dir, "run-end", within_s, count=count)
        print(f"ended after {time.monotonic() - begin:.1f} s: {end.text}")
        host = None if node is None else node_name(node)
        assert (end.data["cause"], end.stage, end.node) == (cause, stage, host), end
        assert text in end.text
        assert end.data["requeued"] is requeued, end
        if not requeued:
            assert self.slurm_state(patience.SLURM) in ("FAILED", "CANCELLED")
            assert self.events()[-1] == end
            self.nothing_is_left()
        return end

    def goes_on(self, within_s: float = patience.JOB, *, left_out: int | None = None) -> None:
        """The requeued job runs again from what was saved, and ends well, without coming to the node `left_out`."""
        assert self.slurm_state(within_s) == "COMPLETED", self.events()[-1]
        end = self.events()[-1]
        assert (end.kind, end.data["cause"]) == ("run-end", "SUCCESS")
        assert "goes on" in (self.run_dir / "logs/train/node00.log").read_text()
        self.nothing_is_left(but_on=left_out)

    def slurm_state(self, within_s: float) -> str:
        return wait_for_end(self.job, within_s)

    def nothing_is_left(self, *, but_on: int | None = None) -> None:
        """And what was saved is still there."""
        self.cluster.assert_nothing_is_left(self.job, self.run_dir, but_on=but_on)
        saved = self.run_dir / "checkpoints"
        if saved.exists():
            assert (saved / "iter_1").read_text() == SAVED

    def mend(self) -> None:
        """Now, and not only when the scene closes."""
        while self._mend:
            self._mend.pop()()

    def close(self) -> None:
        if self.job:
            # A job that has ended as it should is not there to be cancelled.
            with contextlib.suppress(slurm.SlurmError):
                slurm.cancel(self.job)
        self.mend()
        self.cluster.call("up", "--nodes", str(self.nodes))
        if self.job:
            wait_until(lambda: not slurm.call("squeue", "-h", "-j", self.job).strip(), patience.SLURM)


@contextlib.contextmanager
def scene(cluster: DevCluster, run_dir: Path) -> Iterator[Scene]:
    made = Scene(cluster, run_dir)
    try:
        yield made
    finally:
        made.close()

"""From the loss of a node to the first rollout that is trained after it: with spares, and through the queue.

    slurm/devcluster up --nodes 5
    python tools/bench/recovery.py [--nodes 3] [--spares 2] [--base-dir DIR] [--json FILE]

Two real trainings of tiny-qwen3, one after the other, on the development cluster, which has nothing else to do; one
saves after every rollout. After two rollouts the node of the second rank is killed. With spares the run recovers inside
its allocation. Without, the node is started again as soon as the run has ended, so that the requeued job waits for
nothing but Slurm: on a real cluster it would wait for other people's jobs, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from vime.errors import VimeError
from vime.run.folder import read_binding
from vime.run.jobs import read_jobs
from vime.run.journal import Event, read_events
from vime.run.metrics import read_metrics
from vime.slurm import queue as slurm

ROOT = Path(__file__).parents[2]
T = TypeVar("T")
WANTED = 2.0
PATIENCE_S = 1800.0
FLAGS = (
    *("--num-rollout", "3000", "--save-interval", "1", "--eval-interval", "none", "--conversion", "direct"),
    *("--rollout-batch-size", "8", "--over-sampling-batch-size", "8", "--n-samples-per-prompt", "4"),
    *("--num-steps-per-rollout", "1", "--dynamic-sampling-filter-path", "none"),
    *("--no-colocate", "--rollout-num-gpus", "1"),
)


@dataclass(frozen=True)
class Figure:
    """One loss of a node."""

    noticed_s: float
    """From the loss to the run's word of it."""
    trained_s: float
    """From the loss to the next trained rollout."""
    lost_rollouts: int
    """Rollouts trained before the loss and again after it."""
    restarts: int
    """Starts of the job through the queue."""
    attempts: int


def wait_for(what: str, look: Callable[[], T | None]) -> T:
    """The first answer that is not None. Raises SystemExit after the patience."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if (found := look()) is not None:
            return found
        time.sleep(0.2)
    raise SystemExit(f"error: {what} did not come within {PATIENCE_S:.0f} s")


def trained(run: Path) -> int:
    """Number of the newest trained rollout; -1 before the first."""
    return max((number for number, values in read_metrics(run).items() if "train/grad_norm" in values), default=-1)


def ends(run: Path) -> list[Event]:
    return [event for event in read_events(run) if event.kind == "run-end"]


def devcluster(*words: str) -> None:
    subprocess.run([ROOT / "slurm" / "devcluster", *words], check=True, timeout=120, stdout=subprocess.DEVNULL)


def submit(base: Path, name: str, nodes: int, spares: int) -> tuple[Path, str]:
    """Run folder and job of a submitted run."""
    env = {**os.environ, "BASE_DIR": str(base), "XDG_STATE_HOME": str(base / "state")}
    argv = [sys.executable, "-m", "vime.submit", "--recipe", "tiny-qwen3", "--nodes", str(nodes), "--run-name", name]
    argv += ["--spares", str(spares), "--time", "2:00:00", "--", *FLAGS]
    subprocess.run(argv, env=env, check=True, timeout=300, stdout=subprocess.DEVNULL)
    run = base / "runs" / name
    return run, read_jobs(run)[-1].job_id


def measure(base: Path, name: str, nodes: int, spares: int) -> Figure:
    """Train, lose the node of the second rank, and wait until training goes on."""
    run, job = submit(base, name, nodes, spares)
    host = ""
    try:
        wait_for("the second rollout", lambda: True if trained(run) >= 1 else None)
        host = read_binding(run).nodes[1].host
        before, lost_at = trained(run), time.time()
        devcluster("fault", "node-kill", host)
        noticed = wait_for("the end of the attempt", lambda: next(iter(ends(run)), None)).time
        if not spares:
            devcluster("fault", "node-start", host)
        before = max(before, trained(run))
        first = wait_for("the next attempt's training", lambda: _first_again(run, noticed))
        trained_at = time.time()
        starts = [event.data for event in read_events(run) if event.kind == "run-start"]
        return Figure(
            noticed_s=noticed - lost_at,
            trained_s=trained_at - lost_at,
            lost_rollouts=max(0, before - first + 1),
            restarts=max(int(start["restart"]) for start in starts),
            attempts=len(starts),
        )
    finally:
        with contextlib.suppress(VimeError):
            slurm.cancel(job)
        if host:
            devcluster("fault", "node-start", host)
        wait_for("the job's end", lambda: None if (state := slurm.job_state(job)) and state.active else True)


def _first_again(run: Path, since: float) -> int | None:
    """First rollout of the attempt that began after this time, once it is trained."""
    log = run / "logs" / "train" / "node00.log"
    if sum(event.kind == "run-start" and event.time > since for event in read_events(run)) == 0:
        return None
    _, found, rest = log.read_text(errors="replace").rpartition("first rollout ")
    told = [line for line in rest.splitlines() if "grad_norm" in line]
    if not found or not told or log.read_text(errors="replace").count("first rollout ") < 2:
        return None
    return int(rest.split()[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--spares", type=int, default=2)
    parser.add_argument(
        "--base-dir", type=Path, help="folder with tiny-qwen3 and tiny-math; made in a new one if absent"
    )
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recovery-") as name:
        base = args.base_dir or Path(name)
        if not (base / "tiny-qwen3").exists():
            tool = [sys.executable, ROOT / "tools" / "make_tiny_checkpoint.py", "--family", "qwen3"]
            subprocess.run([*tool, "--output-dir", base], check=True, stdout=subprocess.DEVNULL)
        figures = {}
        for way, spares in (("spares", args.spares), ("queue", 0)):
            figures[way] = measure(base, f"recovery-{way}-{os.getpid()}", args.nodes, spares)
            found = figures[way]
            print(
                f"{way}: noticed after {found.noticed_s:.1f} s, trained again after {found.trained_s:.1f} s, "
                f"{found.lost_rollouts} rollouts repeated, {found.restarts} waits in the queue",
                flush=True,
            )
    ratio = figures["queue"].trained_s / figures["spares"].trained_s
    after = [found.trained_s - found.noticed_s for found in (figures["queue"], figures["spares"])]
    print(f"spares are {ratio:.2f} x as fast as an idle queue (at least {WANTED:.0f})")
    print(f"once the loss is noticed, {after[0] / after[1]:.2f} x")
    if args.json:
        content = {way: asdict(found) for way, found in figures.items()}
        args.json.write_text(json.dumps({**content, "ratio": ratio}, indent=1) + "\n")
    return 0 if ratio >= WANTED and figures["spares"].restarts == 0 else 1


if __name__ == "__main__":
    sys.exit(main())

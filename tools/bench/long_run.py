"""Growth of a run's processes over hundreds of rollouts: host memory, shared memory and open files, a rollout.

    python tools/bench/long_run.py --folder /scratch/long [--rollouts 300] [--limit 900]

A real run of a tiny model on this machine: controller, Ray, one trainer rank, one engine, a save every ten rollouts. Of
every process that lives through the run it takes anonymous and shared memory and open files at each rollout, and fits a
line from rollout 50 on. Then the files of the run folder, as bytes for 3,000 rollouts. Prints a table; exits 1 where a
process grows by more than 0.05 MB a rollout, or by more than five open files over the run. A run that the limit ends is
measured as far as it came.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vime.run.metrics import read_metrics
from vime.system.processes import descendants

ROOT = Path(__file__).parents[2]
SETTLED = 50
MOST_MB, MOST_FILES = 0.05, 5.0
STATED_ROLLOUTS = 3000
FLAGS = (
    *("--rollout-batch-size", "8", "--over-sampling-batch-size", "8", "--n-samples-per-prompt", "4"),
    *("--num-steps-per-rollout", "1", "--dynamic-sampling-filter-path", "none", "--eval-interval", "none"),
    *("--save-interval", "10", "--conversion", "direct", "--check-weight-sync", "0"),
)
NAMES = (
    ("vime.train", "driver"),
    ("raylet/raylet", "raylet"),
    ("gcs_server", "gcs"),
    ("DashboardAgent", "Ray's agent"),
    ("dashboard/agent", "Ray's agent"),
    ("VLLM::Engine", "engine, core"),
    ("vime.rollout.serve", "engine, server"),
    ("EngineActor", "engine actor"),
    ("ray::", "trainer rank"),
    ("vime.launch", "controller"),
    ("vime.node.task", "supervisor"),
    ("vime.node.ray_node", "Ray's node"),
)
"""Words of a command line, and what the process is; the first that fits."""


@dataclass
class Seen:
    """Measurements of one process, a row (rollout, anonymous bytes, shared bytes, open files) each."""

    name: str
    rows: list[tuple[int, int, int, int]] = field(default_factory=list)


def measure(pid: int) -> tuple[int, int, int] | None:
    """Anonymous and shared bytes and open files of a process; None for one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        anonymous, shared = (1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))
        return anonymous, shared, len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, KeyError):
        return None


def name_of(pid: int) -> str | None:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return None
    return next((name for part, name in NAMES if part in words), None)


def slope(points: Sequence[tuple[int, int]]) -> float:
    """Least squares' growth a rollout."""
    count = len(points)
    x, y = sum(a for a, _ in points) / count, sum(b for _, b in points) / count
    spread = sum((a - x) ** 2 for a, _ in points)
    return sum((a - x) * (b - y) for a, b in points) / spread if spread else 0.0


def follow(run: subprocess.Popen[bytes], run_dir: Path, seen: dict[int, Seen], limit_s: float) -> int:
    """Measure at every new rollout until the run ends or the limit comes; the last rollout."""
    end, last = time.monotonic() + limit_s, -1
    while run.poll() is None and time.monotonic() < end:
        newest = max(read_metrics(run_dir), default=-1) if (run_dir / "metrics.jsonl").exists() else -1
        if newest == last:
            time.sleep(0.2)
            continue
        last = newest
        for pid in (run.pid, *descendants(run.pid)):
            name, values = name_of(pid), measure(pid)
            if name is not None and values is not None:
                seen.setdefault(pid, Seen(name)).rows.append((last, *values))
    return last


def report(seen: dict[int, Seen], last: int) -> bool:
    """Print a line for each process that lived through the run; whether all keep the bounds."""
    good, measured = True, 0
    print(f"{'process':<16} {'pid':>7} {'MB, first':>11} {'last':>8} {'MB a rollout':>13} {'shared':>8} {'files':>12}")
    for pid, each in sorted(seen.items(), key=lambda item: item[1].name):
        rows = [row for row in each.rows if row[0] >= min(SETTLED, last // 2)]
        if len(rows) < 10 or rows[-1][0] < last - 5:
            continue
        memory, shared, files = (slope([(row[0], row[i]) for row in rows]) for i in (1, 2, 3))
        kept = memory / 1e6 <= MOST_MB and shared / 1e6 <= MOST_MB and files * len(rows) <= MOST_FILES
        good, measured = good and kept, measured + 1
        print(
            f"{each.name:<16} {pid:>7} {rows[0][1] / 1e6:>11.1f} {rows[-1][1] / 1e6:>8.1f} {memory / 1e6:>13.4f} "
            f"{shared / 1e6:>8.4f} {rows[0][3]:>5} -> {rows[-1][3]:<4}{'' if kept else '  GROWS'}"
        )
        if not kept:
            some = each.rows[:: max(1, len(each.rows) // 20)]
            print("    MB at rollouts: " + ", ".join(f"{row[0]}: {row[1] / 1e6:.1f}" for row in some))
    return good and measured > 0


def files(run_dir: Path, rollouts: int) -> None:
    """Print the bytes of the run folder's files, as for STATED_ROLLOUTS rollouts."""
    sizes: dict[str, int] = {}
    for path in run_dir.rglob("*"):
        if path.is_file() and not path.is_symlink():
            top = path.relative_to(run_dir).parts
            name = "/".join(top[:2]) if top[0] == "logs" else top[0]
            sizes[name] = sizes.get(name, 0) + path.stat().st_size
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if size > 1000 and name not in ("code", "checkpoints"):
            stated = size / rollouts * STATED_ROLLOUTS
            print(f"{name:<24} {size / 1e6:>8.2f} MB, {stated / 1e6:>9.1f} MB in {STATED_ROLLOUTS} rollouts")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="$BASE_DIR with tiny-qwen3, or empty")
    parser.add_argument("--rollouts", type=int, default=300)
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for the whole run")
    args = parser.parse_args()
    if not (args.folder / "tiny-qwen3").exists():
        tool = [sys.executable, str(ROOT / "tools" / "make_tiny_checkpoint.py"), "--output-dir", str(args.folder)]
        subprocess.run([*tool, "--family", "qwen3"], check=True)
    env = {**os.environ, "BASE_DIR": str(args.folder), "XDG_STATE_HOME": str(args.folder / "state")}
    command = [sys.executable, "-m", "vime.submit", "--cluster", "local", "--recipe", "tiny-qwen3", "--nodes", "1"]
    command += ["--run-name", "long", "--", *FLAGS, "--num-rollout", str(args.rollouts)]
    run_dir, seen = args.folder / "runs" / "long", {}
    with open(args.folder / "long.log", "wb") as log:
        run = subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log)
    begin = time.monotonic()
    try:
        last = follow(run, run_dir, seen, args.limit)
    finally:
        if run.poll() is None:
            run.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(120)
    print(f"{last + 1} rollouts in {time.monotonic() - begin:.0f} s, exit {run.returncode}")
    good = last > 2 * SETTLED and report(seen, last)
    files(run_dir, max(1, last + 1))
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())

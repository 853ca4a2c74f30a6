"""From a job's start to N Ray nodes alive, pinned and verified: vime, `ray symmetric-run`, and a script that sleeps.

    slurm/devcluster up --nodes 16
    python tools/bench/ray_start.py [--nodes 16] [--json FILE]

One job after another on the same nodes. Each ends when a driver has had an answer from every node. The peers run `ray
start` with the options and environment that vime gives Ray's `Node`, but symmetric-run takes none for the head alone,
so its dashboard stays. vime's time holds its controller and preflight too. The sleeping script is what tutorials do: a
step for the head, 10 s, then a step a worker with 5 s after each. Processor time is that of everything below the nodes'
first processes, on the development cluster.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vime.node.ray_node import ray_environment
from vime.recipe.parallel import ParallelLayout
from vime.recipe.schema import Recipe, ResourceOptions
from vime.run.folder import write_plan
from vime.run.plan import Cluster, Memory, NodePlan, Plan, Ports, Stage, TrainerRank
from vime.schedulers.submission import submit
from vime.slurm import queue as slurm

WANTED = 2.0
PATIENCE_S = 420.0
END_S = 20.0
"""How long a job may take to end by itself."""
STORE = 100 * 10**6
CLUSTER = Path(os.environ.get("VIME_DEVCLUSTER_DIR", "/run/vime-devcluster"))

VERIFY = """
import os, sys, time
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

def alive():
    return [node for node in ray.nodes() if node["Alive"]]

def verify(count, expected=None):
    while len(alive()) < count:
        time.sleep(0.2)

    @ray.remote(num_cpus=0)
    def where():
        return os.uname().nodename

    if expected is None:
        hosts = [node["NodeManagerHostname"] for node in alive()]
        options = [{"scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], False)} for node in alive()]
    else:
        hosts = [host for host, _ in expected]
        options = [{"resources": {pin: 0.001}} for _, pin in expected]
    assert ray.get([where.options(**each).remote() for each in options]) == hosts
    assert len(set(hosts)) == count, hosts
    print(f"verified {time.time()}", flush=True)
"""
PLAIN = VERIFY + "\nray.init(address=sys.argv[1])\nverify(int(sys.argv[2]))\n"
OWN = (
    # Ray reads how it authenticates when it is imported.
    """
import os
from vime.node.ray_node import ray_environment
os.environ.update(ray_environment(os.environ["VIME_RUN"]))
"""
    + VERIFY
    + """
from vime.node.ray_process import pin_resource
from vime.run.messages import report
from vime.run.folder import read_binding, read_plan
from vime.train.__main__ import connect

run = os.environ["VIME_RUN"]
binding = read_binding(run)
connect(read_plan(run), binding)
verify(len(binding.nodes), [(node.host, pin_resource(node.index)) for node in binding.nodes])
report("result")
"""
)


@dataclass(frozen=True)
class Figure:
    """Time of one way."""

    seconds: float
    """From the job's start; the patience where it never got there."""
    cpu_seconds: float
    """Of a node, of all that ran until the job had ended."""
    state: str
    verified: bool


def own_plan(folder: Path, nodes: int) -> Plan:
    """Preflight, Ray and the driver, with nothing to train."""
    run = str(folder / "vime")
    ray = ("-m", "vime.node.ray_node", "--run", run)
    every = tuple(range(nodes))
    stages = (
        Stage(
            name="preflight", nodes=every, command=("-m", "vime.node.preflight", "--run", run), deadline_s=PATIENCE_S
        ),
        Stage(name="ray-head", nodes=(0,), command=(*ray, "--head"), service=True, deadline_s=PATIENCE_S),
        Stage(name="ray-workers", nodes=every[1:], command=(*ray, "--worker"), service=True, deadline_s=PATIENCE_S),
        Stage(name="train", nodes=(0,), command=("-c", OWN), tells_end=True, deadline_s=PATIENCE_S),
    )
    names = [name for name in Ports.model_fields if not name.startswith("worker_")]
    numbers = {name: 2100 + place for place, name in enumerate(names)}
    plan = Plan(
        run_name="vime-ray-start",
        run_dir=run,
        base_dir=None,
        recipe=Recipe(name="stub", resources=ResourceOptions(actor_num_nodes=nodes, actor_num_gpus_per_node=1)),
        model_config_hf={},
        cluster=Cluster(
            name="slurm",
            kind="slurm",
            exclusive=False,
            mem=None,
            gpu_request="none",
            cpus_per_node=2,
            time_limit_minutes=30,
        ),
        layout=ParallelLayout(world_size=nodes),
        nodes=tuple(NodePlan(index=i, gpus=1, host_memory=Memory()) for i in every),
        trainer_ranks=tuple(
            TrainerRank(rank=i, node=i, gpu=0, tp=0, cp=0, dp=i, pp=0, ep=0, etp=0, edp=i) for i in every
        ),
        engines=(),
        ports=Ports(**numbers, worker_first=2100 + len(names), worker_last=2127 + len(names)),
        stages=stages,
    )
    write_plan(plan)
    return plan


def script(folder: Path, nodes: int, body: str) -> str:
    """A batch script with Ray's environment as vime sets it, but for the token."""
    (folder / "verify.py").write_text(PLAIN)
    env = {name: value for name, value in ray_environment(str(folder)).items() if "AUTH" not in name}
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in env.items())
    return f"""#!/bin/bash
#SBATCH --nodes={nodes} --ntasks-per-node=1 --cpus-per-task=2 --time=30
{exports}
names=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head=${{names[0]}}
address=$(getent ahostsv4 "$head" | head -1 | cut -d' ' -f1):6379  # gRPC does not find every name that the node does
step="srun --overlap --nodes=1 --ntasks=1 --cpus-per-task=2 --cpu-bind=none --mpi=none"
options="--num-cpus=2 --object-store-memory={STORE} --disable-usage-stats"
python={shlex.quote(sys.executable)}
export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH  # symmetric-run calls `ray`
ray="$python -m ray.scripts.scripts"
verify={shlex.quote(str(folder / "verify.py"))}
{body}
"""


SYMMETRIC = """
srun --overlap --nodes={nodes} --ntasks={nodes} --cpus-per-task=2 --cpu-bind=none --mpi=none \\
    $ray symmetric-run --address "$address" --min-nodes {nodes} $options -- $python $verify "$address" {nodes}
"""
SLEEPING = """
$step --nodelist=$head $ray start --head --port=6379 --include-dashboard=false --block $options &
sleep 10
for name in "${{names[@]:1}}"; do
    $step --nodelist=$name $ray start --address=$address --block $options &
    sleep 5
done
$step --nodelist=$head $python $verify "$address" {nodes}
"""


def plain_job(folder: Path, nodes: int, body: str) -> str:
    folder.mkdir()
    text = script(folder, nodes, body.format(nodes=nodes))
    argv = ["sbatch", "--parsable", "--no-requeue", "-o", str(folder / "out.log")]
    return subprocess.run(argv, input=text, text=True, capture_output=True, check=True).stdout.strip()


def measure(name: str, nodes: int, start: Callable[[], str], log: Callable[[], Path]) -> Figure:
    """Runs a job until its driver has its answers and a little longer, or gives it up when the patience is over."""
    before = cpu_seconds(nodes)
    job = start()
    deadline, found = time.monotonic() + PATIENCE_S, None
    while found is None and time.monotonic() < deadline:
        state = slurm.job_state(job)
        if state is not None and not state.active:
            break
        found = verified(log())
        time.sleep(0.2)
    found = found or verified(log())
    state = slurm.job_state(job)
    began = state.start if state is not None and state.start is not None else time.time()
    end = time.monotonic() + END_S
    while (state := slurm.job_state(job)) is not None and state.active:
        if time.monotonic() > end:
            # The Ray of the scripts serves until it is told to stop.
            slurm.cancel(job)
            end = math.inf
        time.sleep(0.5)
    used = (cpu_seconds(nodes) - before) / nodes
    figure = Figure(
        PATIENCE_S if found is None else found - began, used, state.state if state else "unknown", found is not None
    )
    told = f"{figure.seconds:.1f} s" if found is not None else f"not within {PATIENCE_S:.0f} s"
    print(f"{name}: {told}, {figure.cpu_seconds:.1f} CPU-seconds a node ({figure.state})", flush=True)
    return figure


def verified(log: Path) -> float | None:
    """Unix time at which the driver had its answers."""
    if not log.exists():
        return None
    words = [line.split() for line in log.read_text(errors="replace").splitlines() if "verified " in line]
    return float(words[-1][-1]) if words else None


def cpu_seconds(nodes: int) -> float:
    """Processor time of all that has run below the first processes of the development cluster's nodes."""
    times: dict[int, tuple[int, int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            # Children that have been waited for stand in their parent's account.
            times[int(entry.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    roots = {int((CLUSTER / "pids" / f"node{i:02d}").read_text().split()[0]) for i in range(1, nodes + 1)}
    level, total = roots, 0
    while level:
        total += sum(times[pid][1] for pid in level if pid in times)
        level = {pid for pid, (parent, _) in times.items() if parent in level}
    return total / os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    args = parser.parse_args()
    nodes = args.nodes
    with tempfile.TemporaryDirectory(prefix="ray-start-") as name:
        folder = Path(name)
        plan = own_plan(folder, nodes)
        own_log = Path(plan.run_dir) / "logs" / "train" / "node00.log"
        figures = {"vime": measure("vime", nodes, lambda: submit(plan), lambda: own_log)}
        for way, body in (("ray symmetric-run", SYMMETRIC), ("sleeping script", SLEEPING)):
            place = folder / way.replace(" ", "-")
            start = lambda place=place, body=body: plain_job(place, nodes, body)  # noqa: E731
            figures[way] = measure(way, nodes, start, lambda place=place: place / "out.log")
    own = figures.pop("vime")
    ratios = {way: figure.seconds / own.seconds for way, figure in figures.items() if figure.verified}
    if args.json:
        content = {"vime": vars(own), **{way: vars(figure) for way, figure in figures.items()}, "ratios": ratios}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    reached = own.verified and own.state == "COMPLETED"
    for way in sorted(set(figures) - set(ratios)):
        print(f"the {way} never had all {nodes} nodes: there is no ratio")
    for way, ratio in ratios.items():
        print(f"vime is {ratio:.2f} x as fast as the {way} on {nodes} nodes (at least {WANTED:.0f})")
    return 0 if reached and all(ratio >= WANTED for ratio in ratios.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

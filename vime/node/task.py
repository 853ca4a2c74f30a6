"""`python -m vime.node.task --run DIR --stage NAME`: one task of a stage on its node, started by a runner.

It finds its logical node and rank, sets the command's environment and supervises the command to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vime.errors import BadInput, Cause, VimeError, is_storage_error
from vime.node.leftovers import OWNER
from vime.node.post_mortem import POST_MORTEM, post_mortem_stage
from vime.node.scratch import NodeFolder
from vime.node.supervise import Supervisor
from vime.node.sweep import SWEEP, sweep_stage
from vime.run.canary import CANARY
from vime.run.chain import PREFLIGHT
from vime.run.devices import VISIBLE
from vime.run.environment import resolve
from vime.run.folder import BINDING_VARIABLE, find_binding, read_plan, task_log
from vime.run.messages import REPORT_FD, Report, encode
from vime.run.node_local import base_folder, cache_folder
from vime.run.plan import Binding, Plan, Stage
from vime.run.tokens import GROUP_KEY, GROUP_KEY_FILE, token_path
from vime.run.variables import JOB, LOCAL_PLACE, LOCAL_RANK, PLACES
from vime.system.private import private_folder
from vime.system.visible import appears

_FOREIGN = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "PMI_", "PMI2_", "PMIX_", "OMPI_", "VIME_")


@dataclass(frozen=True)
class TaskRank:
    """Position of a task in its stage."""

    node: int
    """Number of the logical node (before the binding exists: place in the allocation)."""
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    """Place of the node among the stage's nodes."""


def find_rank(stage: Stage, environ: Mapping[str, str]) -> TaskRank:
    """Find node and rank from `VIME_PLACES` (`0=node01,1=node03`: the stage's nodes in order) and this node's name.

    Slurm's own node and task numbers count inside the step, so they do not map to the plan.
    """
    try:
        places = [entry.split("=", 1) for entry in environ[PLACES].split(",")]
        if LOCAL_PLACE in environ:
            place, local_rank = int(environ[LOCAL_PLACE]), int(environ[LOCAL_RANK])
        else:
            place = [name for _, name in places].index(environ["SLURMD_NODENAME"])
            local_rank = int(environ["SLURM_LOCALID"])
    except (KeyError, ValueError) as error:
        raise BadInput(f"this task does not know its place ({error}): only the controller starts tasks") from error
    per_node = stage.tasks_per_node
    return TaskRank(
        node=int(places[place][0]),
        rank=place * per_node + local_rank,
        world_size=len(places) * per_node,
        local_rank=local_rank,
        local_world_size=per_node,
        node_rank=place,
    )


CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "VLLM_CACHE_ROOT": "vllm",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "CUDA_CACHE_PATH": "cuda",
}
"""Caches of compiled kernels, by variable. They default to the home folder, a network file system that hundreds of
ranks would write to at once; here they are node-local folders, unless already set. They outlive the job: an engine
compiles for a minute, and with DeepGEMM for many, what the next one finds there. Each library keys them by its version
and its options."""


def task_env(
    plan: Plan, stage: Stage, task: TaskRank, binding: Binding | None, environ: Mapping[str, str]
) -> dict[str, str]:
    """Command's environment: this process's without Slurm's and MPI's variables, the profile's, the stage's, the ranks.

    Processes started inside would mistake Slurm's variables for their own: Ray's workers inherit the raylet's.
    """
    env = {name: value for name, value in environ.items() if not name.startswith(_FOREIGN)}
    env.update(resolve({**plan.cluster.env, **stage.env}, environ))
    job = environ.get(JOB, "local")
    if visible := environ.get(VISIBLE) or environ.get("CUDA_VISIBLE_DEVICES"):
        # GPUs that the scheduler assigned on this node; Ray and the ranks narrow CUDA's own variable.
        env[VISIBLE] = visible
    env.update(
        RANK=str(task.rank),
        WORLD_SIZE=str(task.world_size),
        LOCAL_RANK=str(task.local_rank),
        LOCAL_WORLD_SIZE=str(task.local_world_size),
        NODE_RANK=str(task.node_rank),
        VIME_RUN=plan.run_dir,
        **{GROUP_KEY_FILE: str(token_path(plan.run_dir, GROUP_KEY))},
        VIME_NODE=str(task.node),
        **{name: environ[name] for name in (PLACES, JOB, CANARY, BINDING_VARIABLE) if name in environ},
        TMPDIR=str(base_folder() / job),
        **{OWNER: job},
        PYTHONUNBUFFERED="1",
        PYTHONFAULTHANDLER="1",
    )
    for name, folder in CACHES.items():
        env.setdefault(name, str(cache_folder() / folder))
    if binding is not None:
        here, first = binding.nodes[task.node], binding.nodes[stage.nodes[0]]
        env.update(
            MASTER_ADDR=first.address,
            MASTER_PORT=str(plan.ports.stage_master + binding.port_offset),
            VLLM_HOST_IP=here.address,
        )
        if here.interface:
            env.setdefault("GLOO_SOCKET_IFNAME", here.interface)
            # `=`: NCCL treats a bare name as a prefix.
            env.setdefault("NCCL_SOCKET_IFNAME", f"={here.interface}")
        if here.rdma:
            env.setdefault("NCCL_IB_HCA", "=" + ",".join(here.rdma))
    return env


def stage_of(plan: Plan, name: str) -> Stage:
    """Stage of this name: the plan's, or one that the controller adds (sweep, post-mortem)."""
    for stage in plan.stages:
        if stage.name == name:
            return stage
    if name == SWEEP:
        return sweep_stage(tuple(node.index for node in plan.nodes))
    if name == POST_MORTEM:
        return post_mortem_stage(plan)
    raise BadInput(f"the plan has no stage {name!r}: it has {', '.join(stage.name for stage in plan.stages)}")


def run_task(run_dir: str, stage_name: str) -> int:
    """Run the task to its end; return the command's exit code."""
    plan = read_plan(run_dir)
    stage = stage_of(plan, stage_name)
    task = find_rank(stage, os.environ)
    # Preflight comes before the binding, or looks at spares, which have no part in it.
    binding = None if stage.name == PREFLIGHT else find_binding(run_dir)
    env = task_env(plan, stage, task, binding, os.environ)
    for artefact in stage.inputs:
        # The previous stage may have written it on another node. If it does not appear, the command reports it.
        appears(artefact.path)
    folder = NodeFolder(Path(env["TMPDIR"]).name)
    log = task_log(run_dir, stage_name, task.node, task.rank, stage.tasks_per_node)
    private_folder(log.parent)

    def send(report: Report) -> None:
        os.write(1, encode(report))

    def pass_on(line: bytes) -> None:
        kind, data = json.loads(line)
        send(Report(task.rank, kind, data))

    step = os.environ.get("SLURM_STEP_ID")
    host = socket.gethostname()
    send(Report(task.rank, "start", {"node": task.node, "host": host, "pid": os.getpid(), "step": step}))
    supervisor = Supervisor((sys.executable, *stage.command), env, log, on_report=pass_on, report_variable=REPORT_FD)
    end = supervisor.run()
    folder.leave()
    data = {"node": task.node, "host": host, "code": end.code, "signal": end.signal, "stopped": end.stopped}
    send(Report(task.rank, "exit", {**data, "meaning": end.meaning, "tail": end.tail}))
    return end.code


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vime.node.task", description="One task of a stage.")
    parser.add_argument("--run", required=True)
    parser.add_argument("--stage", required=True)
    args = parser.parse_args(argv)
    try:
        return run_task(args.run, args.stage)
    except VimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.cause)
    except OSError as error:
        # To stdout, which srun forwards to the controller; stderr goes to the file system, which may have failed.
        print(f"error: {socket.gethostname()}: {error}", flush=True)
        return int(Cause.STORAGE if is_storage_error(error) else Cause.CODE_ERROR)


if __name__ == "__main__":
    sys.exit(main())

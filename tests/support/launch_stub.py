"""Small plans with stub stages, for tests of the launcher: real processes without training."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support import patience
from vime.recipe.parallel import ParallelLayout
from vime.recipe.schema import Recipe, ResourceOptions
from vime.run.folder import write_plan
from vime.run.plan import Artefact, Cluster, Memory, NodePlan, Plan, Ports, Stage, TrainerRank

PORTS = Ports(
    gcs=2100,
    node_manager=2102,
    object_manager=2103,
    trainer_master=2104,
    stage_master=2105,
    sync_master=2106,
    runtime_env=2107,
    dashboard_agent=2108,
    dashboard_agent_grpc=2109,
    metrics_export=2110,
    worker_first=2111,
    worker_last=2138,
)


def preflight(run_dir: Path, nodes: int) -> Stage:
    command = ("-m", "vime.node.preflight", "--run", str(run_dir))
    return Stage(name="preflight", nodes=tuple(range(nodes)), command=command, deadline_s=patience.PROCESS)


def ray_stages(run_dir: Path, nodes: int, deadline_s: float = patience.JOB) -> list[Stage]:
    """The services as the planner makes them."""
    command = ("-m", "vime.node.ray_node", "--run", str(run_dir))
    head = Stage(name="ray-head", nodes=(0,), command=(*command, "--head"), service=True, deadline_s=deadline_s)
    if nodes == 1:
        return [head]
    others = tuple(range(1, nodes))
    return [
        head,
        Stage(name="ray-workers", nodes=others, command=(*command, "--worker"), service=True, deadline_s=deadline_s),
    ]


def stub(
    name: str, code: str, *, nodes: Sequence[int] = (0,), deadline_s: float = patience.PROCESS, **options: Any
) -> Stage:
    """A stage that runs a piece of Python. One named `train` saves the run's checkpoints, as far as its plan says."""
    if name == "train":
        options.setdefault("outputs", (Artefact(name="checkpoints", path="", kind="run"),))
    return Stage(name=name, nodes=tuple(nodes), command=("-c", code), deadline_s=deadline_s, **options)


MINUTES = math.ceil(10 * patience.SCALE)
"""Time limit of a job of stub stages."""

READY = "from vime.run.messages import report; import time; report('ready'); time.sleep(3600)"
"""A service that is ready at once and stays."""


def service(name: str, code: str = READY, **options: Any) -> Stage:
    return stub(name, code, service=True, **options)


def make_plan(
    run_dir: Path,
    stages: Sequence[Stage],
    *,
    nodes: int = 1,
    kind: str = "local",
    host_bytes: int = 10**6,
    cluster: dict[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """A plan of these stages, written to its run folder."""
    settings = {
        "exclusive": False,
        "mem": None,
        "gpu_request": "none",
        "time_limit_minutes": MINUTES,
        **(cluster or {}),
    }
    plan = Plan(
        run_name=run_dir.name,
        run_dir=str(run_dir),
        base_dir=None,
        recipe=Recipe(name="stub", resources=ResourceOptions(actor_num_nodes=nodes, actor_num_gpus_per_node=1)),
        model_config_hf={},
        cluster=Cluster(name=kind, kind=kind, **settings),
        layout=ParallelLayout(world_size=nodes),
        nodes=tuple(NodePlan(index=i, gpus=1, host_memory=Memory(total_bytes=host_bytes)) for i in range(nodes)),
        trainer_ranks=tuple(
            TrainerRank(rank=i, node=i, gpu=0, tp=0, cp=0, dp=i, pp=0, ep=0, etp=0, edp=i) for i in range(nodes)
        ),
        engines=(),
        ports=PORTS,
        stages=tuple(stages),
        **options,
    )
    write_plan(plan)
    return plan


def folder(name: str, path: Path) -> Artefact:
    return Artefact(name=name, path=str(path), kind="hf")


def write_code(path: Path, text: str = "weights") -> str:
    """Code of a stage that makes an output folder."""
    where = json.dumps(str(path))
    return f"import pathlib; p = pathlib.Path({where}); p.mkdir(); (p / 'model').write_text({text!r}); print('made it')"

"""The shape `chain`: one Slurm job per stage, each with its part of the plan."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vime.errors import BadInput
from vime.run.plan import Memory, NodePlan, Plan, Stage

PREFLIGHT = "preflight"
LOOKS = (PREFLIGHT, "ring")
"""Stages that test a job's nodes; `ring` tests the network, if the nodes work together."""
REHEARSAL = "rehearsal"
"""Stage that tries what later stages need; part of the first job, before the first byte is converted."""
_MARGIN_S = 300.0
"""Margin of a job's time limit over its stages' deadlines, so that those expire first and name the stage that hangs."""


@dataclass(frozen=True)
class Link:
    """One job of a chain. A run of the shape `allocation` is one job, and has no links."""

    name: str
    """Name of the stage that the job runs: `cast`, `convert`, `train` or `report`."""
    index: int
    stages: tuple[Stage, ...]
    """Stages of the job: preflight on its nodes, the rehearsal in the first job, services that the stage needs, and the
    stage."""
    after: str | None
    """Name of the link that must succeed before this one."""
    before: str | None
    """Name of the link that waits for this one."""


def links(plan: Plan) -> tuple[Link, ...]:
    """Jobs of a chain in order: one per stage that ends, with the services that precede it."""
    groups: list[list[Stage]] = [[]]
    for stage in plan.stages:
        if stage.name in (*LOOKS, REHEARSAL):
            continue
        groups[-1].append(stage)
        if not stage.service:
            groups.append([])
    names = [group[-1].name for group in groups if group]
    return tuple(
        Link(
            name=name,
            index=index,
            stages=(*_preflight(plan, group), *(() if index else _rehearsal(plan, group)), *group),
            after=names[index - 1] if index else None,
            before=names[index + 1] if index + 1 < len(names) else None,
        )
        for index, (name, group) in enumerate(zip(names, groups, strict=False))
    )


def find_link(plan: Plan, name: str | None) -> Link | None:
    """Link of this name; None for a plan without links if `name` is None. Raises BadInput otherwise."""
    if plan.shape != "chain":
        if name is None:
            return None
        raise BadInput(f"--stage is {name!r}, but the run is one job: give --shape chain, or leave --stage out")
    known = {link.name: link for link in links(plan)}
    if name is None or name not in known:
        raise BadInput(f"--stage is {name!r}: a job of this chain is one of {', '.join(known)}")
    return known[name]


def part(plan: Plan, link: Link | None) -> Plan:
    """Plan of one job: its stages, the nodes and GPUs they use, and the time they may need.

    Only the job that holds services (Ray) needs the memory of the trainer and the engines.
    """
    if link is None:
        return plan
    count = _nodes(link.stages)
    nodes = plan.nodes[:count]
    gpus = max(stage.gpus_per_node for stage in link.stages)
    if not any(stage.service for stage in link.stages):
        nodes = tuple(NodePlan(index=node.index, gpus=node.gpus, host_memory=Memory()) for node in nodes)
    minutes = math.ceil((sum(stage.deadline_s for stage in link.stages) + _MARGIN_S) / 60)
    minutes = min(minutes, plan.cluster.time_limit_minutes)
    cluster = plan.cluster.model_copy(
        update={"gpus_per_node": plan.cluster.gpus_per_node if gpus else 0, "time_limit_minutes": minutes}
    )
    return plan.model_copy(
        update={
            "stages": link.stages,
            "nodes": nodes,
            "cluster": cluster,
            "signal_lead_s": min(plan.signal_lead_s, minutes * 60 // 4),
        }
    )


def _nodes(stages: tuple[Stage, ...] | list[Stage]) -> int:
    return 1 + max(node for stage in stages for node in stage.nodes)


def _preflight(plan: Plan, group: list[Stage]) -> tuple[Stage, ...]:
    """Preflight stages of a job, whose nodes differ from those of the previous job."""
    count = _nodes(group)
    wanted = LOOKS if any(stage.service for stage in group) else LOOKS[:1]
    found = (stage for stage in plan.stages if stage.name in wanted)
    return tuple(stage.model_copy(update={"nodes": stage.nodes[:count]}) for stage in found)


def _rehearsal(plan: Plan, group: list[Stage]) -> tuple[Stage, ...]:
    """The rehearsal with the GPUs that the job has anyway: a job that converts asks for none."""
    gpus = max(stage.gpus_per_node for stage in group)
    found = (stage for stage in plan.stages if stage.name == REHEARSAL)
    return tuple(stage.model_copy(update={"gpus_per_node": gpus}) for stage in found)

"""Resources that a plan needs, in addition to its placement: text and JSON for `vime.plan`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from vime.models.config import ModelConfig
from vime.planning import advice, fit, traffic
from vime.planning.counts import Kind, stage_parts
from vime.planning.show import duration, ranges, size, table
from vime.recipe.schema import Recipe
from vime.run.plan import GpuMemory, Plan
from vime.system.redact import redacted


@dataclass(frozen=True)
class Needs:
    """Everything derived from a plan and from the disk."""

    shortages: tuple[fit.Shortage, ...]
    least: fit.Fit | None
    """Smallest number of nodes that fits; computed only if the plan does not fit."""
    levers: tuple[advice.Lever, ...]
    flows: tuple[traffic.Flow, ...]
    space: tuple[traffic.Space, ...]
    parts: tuple[dict[Kind, int], ...]
    """Parameters of one rank of each pipeline stage, by kind."""
    checkpoint_bytes: int


def needs_of(plan: Plan, recipe: Recipe | None = None) -> Needs:
    """Needs of a plan. `recipe`: as the user gave it, for the layout search; by default the plan's."""
    config, lacks = plan.model, fit.shortages(plan)
    known = plan.cluster.memory_per_node_bytes is not None
    return Needs(
        shortages=lacks,
        least=fit.least_nodes(recipe or plan.recipe, config, plan.cluster) if lacks and known else None,
        levers=advice.levers(plan),
        flows=traffic.flows(plan),
        space=traffic.free_space(plan),
        parts=parameters(plan, config),
        checkpoint_bytes=traffic.checkpoint_bytes(plan),
    )


def parameters(plan: Plan, config: ModelConfig) -> tuple[dict[Kind, int], ...]:
    """Parameters of one rank of each pipeline stage, by kind."""
    stages = stage_parts(config, plan.layout, mtp=plan.recipe.model.mtp_num_layers > 0)
    return tuple({kind: n for kind, counts in parts.items() if (n := counts.of_rank(plan.layout))} for parts in stages)


def as_json(plan: Plan, needs: Needs) -> dict[str, Any]:
    """The plan's own fields and the values derived from them."""
    least = needs.least
    return {
        **redacted(plan.model_dump(mode="json")),
        "fits": not needs.shortages,
        "shortages": [dataclasses.asdict(one) for one in needs.shortages],
        "least_nodes": least and {"nodes": least.nodes, "flags": least.flags, "host_bytes": least.host_bytes},
        "savings": [dataclasses.asdict(lever) for lever in needs.levers],
        "traffic": [dataclasses.asdict(flow) for flow in needs.flows],
        "disk": [
            {"path": one.path, "free_bytes": one.free_bytes, "needs": dict(one.needs), "fits": one.fits}
            for one in needs.space
        ],
        "parameters_per_rank": [{**{kind.value: n for kind, n in parts.items()}} for parts in needs.parts],
        "checkpoint_bytes": needs.checkpoint_bytes,
    }


def render_needs(plan: Plan, needs: Needs) -> str:
    """Sections that follow the plan's own."""
    sections = [
        _verdict(plan, needs), _parameters(needs), _gpu(plan), _levers(plan, needs), _traffic(needs), _space(needs),
    ]  # fmt: skip
    return "\n\n".join(section for section in sections if section) + "\n"


def _verdict(plan: Plan, needs: Needs) -> str:
    lines = ["Does it fit?"]
    has = plan.cluster.memory_per_node_bytes
    if not needs.shortages:
        if has is None:
            lines.append(
                "  the nodes' host memory is not known here: give --node-memory; preflight checks it on the nodes"
            )
        else:
            most = advice.fullest(plan).host_memory.total_bytes
            lines.append(f"  yes: the fullest node needs {size(most)} of {size(has)} host memory")
        return "\n".join(lines)
    lines += [f"  no: {lack}" for lack in needs.shortages]
    if needs.least is not None:
        flags = f" -- {' '.join(needs.least.flags)}" if needs.least.flags else ""
        lines.append(f"  the least that fits: --nodes {needs.least.nodes}{flags}")
        lines.append(f"    {size(needs.least.host_bytes)} on the fullest node; --nodes auto takes it")
    elif has is not None:
        lines.append(f"  no layout of up to {fit.MOST_NODES} nodes fits with {fit.MOST_CHANGES} parallel sizes changed")
    host = [lack for lack in needs.shortages if lack.what == "host memory"]
    enough = [one for one in needs.levers for lack in host if lack.needs_bytes - one.saves_bytes <= lack.has_bytes]
    if enough:
        lines.append("  on its own each of these would do: " + "; ".join(f"{one.what} ({one.how})" for one in enough))
    return "\n".join(lines)


def _parameters(needs: Needs) -> str:
    kinds = [kind for kind in Kind if any(kind in parts for parts in needs.parts)]
    rows = [
        (stage, f"{sum(parts.values()):,}", *(f"{parts.get(kind, 0):,}" for kind in kinds))
        for stage, parts in enumerate(needs.parts)
    ]
    return "\n".join(["Parameters of one rank, by pipeline stage", table(("stage", "all", *kinds), rows)])


def _gpu(plan: Plan) -> str:
    groups: list[tuple[list[int], GpuMemory]] = []
    for node in plan.nodes:
        if node.gpu_memory is None:
            continue
        if groups and groups[-1][1] == node.gpu_memory:
            groups[-1][0].append(node.index)
        else:
            groups.append(([node.index], node.gpu_memory))
    if not groups:
        return ""
    lines = [f"GPU memory a rank: an estimate, of {size(groups[0][1].gpu_bytes)}"]
    lines += [f"  node {ranges(nodes)}: training {size(gpu.training.total_bytes)}" for nodes, gpu in groups]
    most = max((gpu for _, gpu in groups), key=lambda gpu: gpu.training.total_bytes)
    for name, memory in (("training", most.training), ("engine", most.engine)):
        rows = [(item.name, size(item.bytes), item.why) for item in memory.items]
        lines += ["", f"  {name}, {size(memory.total_bytes)}", table(("item", "size", "why"), rows, indent="    ")]
    return "\n".join(lines)


def _levers(plan: Plan, needs: Needs) -> str:
    if not needs.levers:
        return ""
    left, rows = advice.fullest(plan).host_memory.total_bytes, []
    for lever in needs.levers:
        left -= lever.saves_bytes
        rows.append((lever.what, size(lever.saves_bytes), size(left), lever.how))
    return "\n".join(["What would bring the fullest node down", table(("change", "saves", "then", "how"), rows)])


def _traffic(needs: Needs) -> str:
    rows = [(flow.name, flow.when, size(flow.bytes), _seconds(flow.seconds), flow.why) for flow in needs.flows]
    rates = (
        f"disk {traffic.DISK / 1e9:.0f} GB/s a node, network {traffic.NETWORK / 1e9:.0f} GB/s a GPU, PCIe "
        f"{traffic.PCIE / 1e9:.0f} GB/s a GPU, host memory {traffic.DRAM / 1e9:.0f} GB/s a node"
    )
    head = f"Traffic, and its time at {rates}: an estimate"
    return "\n".join([head, table(("what", "when", "bytes", "time", "why"), rows)])


def _space(needs: Needs) -> str:
    lines = [f"Disk (one checkpoint is {size(needs.checkpoint_bytes)})"]
    for one in needs.space:
        wanted = ", ".join(f"{name} {size(count)}" for name, count in one.needs)
        verdict = "fits" if one.fits else f"too little by {size(one.needs_bytes - one.free_bytes)}"
        lines.append(f"  {one.path}: {size(one.free_bytes)} free, {wanted}: {verdict}")
    return "\n".join(lines)


def _seconds(count: float) -> str:
    return f"{count:.1g} s" if count < 10 else duration(count)


def signed(count: int) -> str:
    """Bytes with their sign."""
    return f"{'-' if count < 0 else '+'}{size(abs(count))}"

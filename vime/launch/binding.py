"""From preflight's findings to the binding: fit nodes, the host of each logical node, free ports."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vime.errors import Cause
from vime.launch.failure import Failure, RunFailed
from vime.launch.steps import Runner, Step
from vime.node.checks import Findings, Known, Problem, gb, problems
from vime.planning import ports
from vime.run.plan import Binding, BoundNode, Plan, Ports
from vime.system.files import PRIVATE, write_json

PREFLIGHT = "preflight.json"


@dataclass(frozen=True)
class Examined:
    """The allocation after preflight."""

    findings: Findings
    problems: Sequence[Problem]
    switches: Mapping[int, str] = field(default_factory=dict)
    """Leaf switch by place; empty if the topology is unknown."""

    @property
    def fit(self) -> list[int]:
        """Places of the fit nodes, in the allocation's order."""
        bad = {problem.place for problem in self.problems}
        return [place for place in sorted(self.findings) if place not in bad]

    @property
    def text(self) -> str:
        told = f"{len(self.fit)} of {len(self.findings)} nodes are fit"
        return told + ("; left out: " + "; ".join(map(str, self.problems)) if self.problems else "")


def examine(plan: Plan, step: Step, known: Known, switches: Mapping[int, str]) -> Examined:
    """Judge the nodes after preflight. Raises RunFailed if too few are fit."""
    findings = _findings_of(step)
    return require_enough(plan, Examined(findings, problems(plan, findings, known), switches))


def _findings_of(step: Step) -> Findings:
    """Reports of a preflight by place. Raises RunFailed for a node without one."""
    findings = {step.places[report.rank].index: report.data for report in step.of_kind("result")}
    for place in step.places:
        if place.index not in findings:
            raise _refuse(f"{place.name}: preflight ended without a result", place.name)
    return findings


def require_enough(plan: Plan, examined: Examined) -> Examined:
    """Return `examined` if enough nodes are fit. Raises RunFailed with every problem otherwise."""
    if len(examined.fit) >= len(plan.nodes):
        return examined
    first, told = examined.problems[0], "; ".join(map(str, examined.problems))
    text = f"preflight failed: {told} ({len(examined.fit)} of {len(plan.nodes)} nodes are fit)"
    # A requeue helps only if other nodes would mend every problem.
    mended = all(problem.cause.requeue_mends for problem in examined.problems)
    cause = first.cause if mended else next(p.cause for p in examined.problems if not p.cause.requeue_mends)
    raise RunFailed(Failure(cause, text, "preflight", first.node))


def bind(plan: Plan, runner: Runner, examined: Examined, *, end_time: float | None, everyone: bool = False) -> Binding:
    """Binding of an allocation. With `everyone`, spare nodes follow those that the plan needs."""
    span = max((len(engine.nodes) for engine in plan.servers), default=1)
    ordered = by_switch(examined.fit, examined.switches, span)
    chosen = ordered if everyone else ordered[: len(plan.nodes)]
    facts = {place: examined.findings[place] for place in chosen}
    return Binding(
        job_id=runner.job,
        restart=runner.restart,
        nodes=tuple(_bound_node(index, place, facts[place]) for index, place in enumerate(chosen)),
        port_offset=free_offset(plan, _job_number(runner.job), facts),
        end_time=end_time,
    )


def refill(
    plan: Plan, binding: Binding, vacant: Sequence[int], before: Examined, step: Step, known: Known
) -> tuple[Examined, Binding]:
    """Findings of all nodes after a preflight of spares, and the binding in which spares take the vacant logical nodes.

    Raises RunFailed if too few spares are fit, or have the binding's ports free.
    """
    findings, places = _findings_of(step), {place.index for place in step.places}
    lost = {node.slurm_index for node in binding.nodes if node.index in vacant}
    every = {**{place: found for place, found in before.findings.items() if place not in lost}, **findings}
    judged = [problem for problem in problems(plan, every, known) if problem.place in places]
    ports_taken = {port + binding.port_offset for port in port_numbers(plan)}
    for place, found in findings.items():
        if clash := sorted(ports_taken & set(found["listening"])):
            judged.append(Problem(place, found["host"], f"port {clash[0]}", "taken", "to be free"))
    earlier = [problem for problem in before.problems if problem.place not in places | lost]
    examined = replace(before, findings=every, problems=[*earlier, *judged])
    fit = [place for place in sorted(places) if place not in {problem.place for problem in judged}]
    if len(fit) < len(vacant):
        told = "; ".join(map(str, judged)) or "none is left"
        raise _refuse(f"{len(fit)} spares are fit of {len(vacant)} that the run needs: {told}", None)
    taken = dict(zip(vacant, fit, strict=False))
    nodes = (
        _bound_node(node.index, taken[node.index], findings[taken[node.index]]) if node.index in taken else node
        for node in binding.nodes
    )
    return examined, binding.model_copy(update={"nodes": tuple(nodes)})


def by_switch(places: Sequence[int], switches: Mapping[int, str], span: int) -> list[int]:
    """Group nodes by switch, so that `span` consecutive ones (an engine) share a switch if possible.

    Switches are ordered by their first nodes; each one's remainder after whole groups of `span` comes last.
    """
    groups: dict[str, list[int]] = {}
    for place in places:
        groups.setdefault(switches.get(place, ""), []).append(place)
    whole = [place for group in groups.values() for place in group[: len(group) // span * span]]
    return whole + [place for group in groups.values() for place in group[len(group) // span * span :]]


def free_offset(plan: Plan, job: int, findings: Findings) -> int:
    """First offset, starting at the job's own, at which no node has a listener. Raises RunFailed if there is none."""
    choices = ports.offsets(plan)
    first = choices.index(ports.offset_of_job(plan, job))
    wanted = set(port_numbers(plan))
    taken = {found["host"]: set(found["listening"]) for found in findings.values()}
    for offset in choices[first:] + choices[:first]:
        moved = {port + offset for port in wanted}
        if not any(moved & busy for busy in taken.values()):
            return offset
    for host, busy in taken.items():
        if clash := sorted(wanted & busy):
            raise _refuse(f"{host}: port {clash[0]} is taken, and so is one of every other block of ports", host)
    raise _refuse("every block of ports has one that is taken on a node", None)


def port_numbers(plan: Plan) -> Iterator[int]:
    """All ports of the plan, without the offset."""
    for name in Ports.model_fields:
        if not name.startswith("worker_"):
            yield getattr(plan.ports, name)
    yield from range(plan.ports.worker_first, plan.ports.worker_last + 1)
    for engine in plan.servers:
        yield engine.port
        yield from range(engine.aux_port, engine.aux_port + ports.AUX_PORTS)


def table(examined: Examined) -> list[dict[str, Any]]:
    """One row per node, for people."""
    why: dict[int, list[str]] = {}
    for problem in examined.problems:
        why.setdefault(problem.place, []).append(str(problem).removeprefix(f"{problem.node}: "))
    return [
        {
            "node": facts["host"],
            "address": facts["address"],
            "interface": facts["interface"] or "",
            "switch": examined.switches.get(place, ""),
            "memory": gb(facts["memory_available"]),
            "cpus": facts["cpus"],
            "gpus": len(facts["gpus"].get("gpus", ())),
            "rdma": sum(state == "ACTIVE" for state in facts["rdma"].values()),
            "result": "; ".join(why.get(place, ())) or "fit",
        }
        for place, facts in sorted(examined.findings.items())
    ]


def write_report(run_dir: Path, examined: Examined, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `<run>/preflight.json`: the table, every problem and all reports of the nodes."""
    content = {
        "nodes": rows,
        "problems": [asdict(problem) | {"cause": problem.cause.name} for problem in examined.problems],
        "findings": [examined.findings[place] for place in sorted(examined.findings)],
    }
    write_json(run_dir / PREFLIGHT, content, mode=PRIVATE)


def _bound_node(index: int, place: int, facts: Mapping[str, Any]) -> BoundNode:
    return BoundNode(
        index=index,
        host=facts["host"],
        address=facts["address"],
        interface=facts["interface"],
        rdma=tuple(port for port, state in sorted(facts["rdma"].items()) if state == "ACTIVE"),
        slurm_index=place,
    )


def _job_number(job: str) -> int:
    return int(job) if job.isdigit() else zlib.crc32(job.encode())


def _refuse(text: str, node: str | None) -> RunFailed:
    told = f"preflight failed: {text} (docs/faults.md#preflight)"
    return RunFailed(Failure(Cause.PREFLIGHT, told, "preflight", node))

"""From the findings of preflight to the binding: which nodes are fit, which host is which node, what ports are free."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vime.errors import Cause
from vime.launch.failure import Failure, RunFailed
from vime.launch.steps import Runner, Step
from vime.planning import ports
from vime.planning.types import Binding, BoundNode, Plan, Ports

Findings = Mapping[int, Mapping[str, Any]]
"""What vime.launch.preflight reported, by place in the allocation."""


@dataclass(frozen=True)
class Problem:
    """Why a node is not fit."""

    place: int
    node: str
    check: str
    value: str
    need: str

    def __str__(self) -> str:
        return f"{self.node}: {self.check} is {self.value}, needs {self.need}"


@dataclass(frozen=True)
class Bound:
    """The outcome of preflight."""

    binding: Binding
    table: list[dict[str, Any]]
    """A row a node, for people."""
    text: str


def bind(plan: Plan, runner: Runner, step: Step, *, end_time: float | None) -> Bound:
    """The binding of an allocation whose preflight has ended. Raises RunFailed where too few nodes are fit."""
    findings = {report.rank: report.data for report in step.of_kind("result")}
    for place in step.places:
        if place.index not in findings:
            raise _refuse(f"{place.name}: preflight ended without a result", place.name)
    found = list(problems(plan, findings))
    if plan.cluster.kind != "local":
        found += list(_shared_addresses(findings))
    bad = {problem.place for problem in found}
    fit = [place for place in sorted(findings) if place not in bad]
    if len(fit) < len(plan.nodes):
        told = "; ".join(str(problem) for problem in found)
        raise _refuse(f"{told} ({len(fit)} of {len(plan.nodes)} nodes are fit)", found[0].node)
    chosen = fit[: len(plan.nodes)]
    offset = free_offset(plan, _job_number(runner.job), {place: findings[place] for place in chosen})
    binding = Binding(
        job_id=runner.job,
        restart=runner.restart,
        nodes=tuple(_bound_node(index, place, findings[place]) for index, place in enumerate(chosen)),
        port_offset=offset,
        end_time=end_time,
    )
    text = f"{len(fit)} of {len(findings)} nodes are fit"
    if found:
        text += "; left out: " + "; ".join(str(problem) for problem in found)
    return Bound(binding, table(findings, found), text)


def problems(plan: Plan, findings: Findings) -> Iterator[Problem]:
    """What keeps nodes from taking part. Any node may become any logical node, so it needs the most that one does."""
    need = max((node.host_memory.total_bytes for node in plan.nodes), default=0)
    for place, found in sorted(findings.items()):
        node = found["host"]
        if found["memory_available"] < need:
            yield Problem(place, node, "available host memory", _gb(found["memory_available"]), _gb(need))
        if found["run_folder"] is not None:
            yield Problem(place, node, f"run folder {plan.run_dir}", found["run_folder"], "to be shared and writable")
        if not found["address"]:
            wanted = plan.cluster.network_interface
            yield Problem(place, node, f"interface {wanted}", "without an address", "an IPv4 address")
    for name, common, others in _differences(findings):
        for place, value in others.items():
            yield Problem(place, findings[place]["host"], f"version of {name}", value, f"{common}, as on other nodes")


def _differences(findings: Findings) -> Iterator[tuple[str, str, dict[int, str]]]:
    """Per library whose version is not the same everywhere: its name, the commonest version, and who has another."""
    names = sorted({name for found in findings.values() for name in found["versions"]})
    for name in names:
        have = {place: found["versions"].get(name, "missing") for place, found in findings.items()}
        common = Counter(have.values()).most_common(1)[0][0]
        others = {place: version for place, version in have.items() if version != common}
        if others:
            yield name, common, others


def _shared_addresses(findings: Findings) -> Iterator[Problem]:
    if len(findings) == 1:
        return
    count = Counter(found["address"] for found in findings.values())
    for place, found in sorted(findings.items()):
        if count[found["address"]] > 1 or found["address"].startswith("127."):
            yield Problem(place, found["host"], "address", found["address"], "one of its own that other nodes reach")


def free_offset(plan: Plan, job: int, findings: Findings) -> int:
    """The first offset, from the job's own on, at which no node has a listener. Raises RunFailed when there is none."""
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
    """Every port of the plan, without an offset."""
    for name in Ports.model_fields:
        if not name.startswith("worker_"):
            yield getattr(plan.ports, name)
    yield from range(plan.ports.worker_first, plan.ports.worker_last + 1)
    for engine in plan.engines:
        yield engine.port
        yield from range(engine.aux_port, engine.aux_port + ports.AUX_PORTS)


def table(findings: Findings, found: list[Problem]) -> list[dict[str, Any]]:
    """A row a node."""
    by_place = {place: [str(problem) for problem in found if problem.place == place] for place in findings}
    return [
        {
            "node": facts["host"],
            "address": facts["address"],
            "interface": facts["interface"],
            "memory available": _gb(facts["memory_available"]),
            "cpus": facts["cpus"],
            "result": "; ".join(by_place[place]) or "fit",
        }
        for place, facts in sorted(findings.items())
    ]


def _bound_node(index: int, place: int, facts: Mapping[str, Any]) -> BoundNode:
    return BoundNode(
        index=index, host=facts["host"], address=facts["address"], interface=facts["interface"], slurm_index=place
    )


def _job_number(job: str) -> int:
    return int(job) if job.isdigit() else zlib.crc32(job.encode())


def _gb(number: int) -> str:
    return f"{number / 1e9:.1f} GB"


def _refuse(text: str, node: str | None) -> RunFailed:
    return RunFailed(Failure(Cause.PREFLIGHT, f"preflight failed: {text}", "preflight", node))

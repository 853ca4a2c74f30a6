"""Nodes of the allocation: their state after preflight, and the selection that the run uses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from vime.launch.binding import Examined, bind, examine, require_enough, table, write_report
from vime.launch.steps import AllocatedNode, Runner, Step
from vime.node.checks import Known, slow_nodes
from vime.node.ring import RING
from vime.planning.show import table as columns
from vime.run import history
from vime.run.canary import CANARY, hosts_unseen, release_canary
from vime.run.folder import BINDING_VARIABLE, binding_text, write_binding
from vime.run.journal import read_events
from vime.run.plan import Binding, Plan, Stage

PREFLIGHT = "preflight"


def known_as(node: str, names: Sequence[str]) -> str:
    """Slurm's name for a host, matched without the domain; `node` itself if none matches."""
    if node in names:
        return node
    same = [name for name in names if name.partition(".")[0] == node.partition(".")[0]]
    return same[0] if len(set(same)) == 1 else node


class Allocation:
    """Turns node names into the binding. `event` writes to the journal, `say` prints a line."""

    def __init__(self, plan: Plan, runner: Runner, *, event: Callable[..., None], say: Callable[[str], None]) -> None:
        self._plan, self._runner, self._event, self._say = plan, runner, event, say
        self._run = Path(plan.run_dir)
        self._examined = Examined({}, ())
        self._canary = ""
        self._left_out: set[str] = set()
        self._version = 0
        """Version of the newest binding."""
        self.binding: Binding | None = None

    def places(self, stage: Stage) -> tuple[AllocatedNode, ...]:
        """Nodes on which a stage runs."""
        names = self._runner.nodes()
        if self.binding is None:
            # Preflight inspects every node of the allocation, including spares.
            return tuple(AllocatedNode(i, name) for i, name in enumerate(names) if name not in self._left_out)
        if stage.name == RING:
            return tuple(AllocatedNode(node.index, names[node.slurm_index]) for node in self.binding.nodes)
        bound = {node.index: names[node.slurm_index] for node in self.binding.nodes}
        return tuple(AllocatedNode(node, bound[node]) for node in stage.nodes)

    def lacks_without(self, names: Collection[str]) -> str:
        """Shortage of the allocation without these nodes as well; empty if enough nodes are left."""
        left, need = set(self._runner.nodes()) - self._left_out - set(names), len(self._plan.nodes)
        return "" if len(left) >= need else f"{len(left)} nodes are left of {need} (--spares)"

    def leave_out(self, names: Collection[str]) -> int:
        """Leave out nodes from now on, and forget the binding; return the number of nodes left."""
        self._left_out |= set(names)
        self.binding = None
        self._runner.environment.pop(BINDING_VARIABLE, None)
        return len(set(self._runner.nodes()) - self._left_out)

    def prepare(self, stage: Stage) -> None:
        """Called before a stage starts."""
        if stage.name == PREFLIGHT:
            self._canary = release_canary(self._run)
            self._runner.environment[CANARY] = self._canary

    def learn(self, step: Step) -> None:
        """Called after a stage has ended well. Raises RunFailed if too few nodes are fit."""
        if step.stage.name == PREFLIGHT:
            self._examine(step)
        elif step.stage.name == RING:
            self._drop_slow(step)

    def node_names(self) -> tuple[str, ...]:
        """Slurm's names of the logical nodes; empty before the binding exists."""
        names = self._runner.nodes()
        return tuple(names[node.slurm_index] for node in (self.binding.nodes if self.binding else ()))

    def lost_nodes(self) -> dict[str, str]:
        """Lost nodes of the run by Slurm's name, each with the evidence."""
        used = set(self.node_names() or self._runner.nodes()) - self._left_out
        return {name: how for name, how in self._runner.lost_nodes().items() if name in used}

    def name_of(self, node: str) -> str:
        """Slurm's name of a node, given its host name, with or without a domain, or its address."""
        names = self._runner.nodes()
        for bound in self.binding.nodes if self.binding else ():
            if node in (bound.host, bound.address):
                return names[bound.slurm_index]
        return known_as(node, names)

    def _examine(self, step: Step) -> None:
        """Make the binding from preflight's findings."""
        places, limits, switches = step.places, self._runner.memory_limits(), self._runner.switches()
        places_of = {report.data["host"]: places[report.rank].index for report in step.of_kind("result")}
        failures = history.node_failures(read_events(self._run), self.name_of)
        often = history.failed_too_often(failures)
        name_of_host = {report.data["host"]: step.name_of(report.rank) for report in step.of_kind("result")}
        known = Known(
            job_memory={place.index: limits[place.name] for place in places if place.name in limits},
            moments={places[r.rank].index: (step.started_at, r.arrived) for r in step.of_kind("result")},
            canary=self._canary,
            unseen=[places_of[host] for host in hosts_unseen(self._run, set(places_of))],
            failures={host: failures[name] for host, name in name_of_host.items() if name in often},
        )
        leaves = {place.index: switches[place.name] for place in places if place.name in switches}
        self._examined = examine(self._plan, step, known, leaves)
        self._bind(everyone=any(stage.name == RING for stage in self._plan.stages))

    def _drop_slow(self, step: Step) -> None:
        """Bind again, without the nodes whose network is too slow."""
        assert self.binding is not None
        places = [node.slurm_index for node in self.binding.nodes]
        floor = self._plan.cluster.min_network_gbit or 0.0
        slow = slow_nodes(step.of_kind("result"), places, floor)
        self._examined = require_enough(self._plan, replace(self._examined, problems=[*self._examined.problems, *slow]))
        self._bind(everyone=False)

    def _bind(self, *, everyone: bool) -> None:
        examined = self._examined
        rows = table(examined)
        self._event("preflight", examined.text, stage="preflight", data={"nodes": rows})
        self._say(columns(tuple(rows[0]), [tuple(row.values()) for row in rows]))
        write_report(self._run, examined, rows)
        binding = bind(self._plan, self._runner, examined, end_time=self._runner.end_time(), everyone=everyone)
        self._version += 1
        self.binding = binding = binding.model_copy(update={"version": self._version})
        write_binding(self._run, binding)
        # Also passed by variable: a node's file system may show the file late.
        self._runner.environment[BINDING_VARIABLE] = binding_text(self._run, binding)
        hosts = {str(node.index): node.host for node in binding.nodes}
        self._event("binding", f"{len(hosts)} nodes, ports moved by {binding.port_offset}", data={"hosts": hosts})

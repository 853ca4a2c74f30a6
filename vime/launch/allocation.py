"""Nodes of the allocation: their state after preflight, and the selection that the run uses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from vime.launch.binding import Examined, bind, examine, refill, require_enough, table, write_report
from vime.launch.steps import AllocatedNode, Runner, Step
from vime.node.checks import Known, slow_nodes
from vime.node.ring import RING
from vime.planning.show import table as columns
from vime.run import history
from vime.run.canary import CANARY, hosts_unseen, release_canary
from vime.run.chain import PREFLIGHT
from vime.run.folder import BINDING_VARIABLE, binding_text, write_binding
from vime.run.journal import read_events
from vime.run.plan import Binding, Plan, Stage


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
        self._renewed: tuple[int, ...] | None = None
        """Logical nodes that get new hosts while the services of the others run on; None: nothing is kept."""
        self._version = 0
        """Version of the newest binding."""
        self.binding: Binding | None = None

    def places(self, stage: Stage) -> tuple[AllocatedNode, ...]:
        """Nodes on which a stage runs; of services that are kept, only new hosts."""
        names = self._runner.nodes()
        left = [AllocatedNode(i, name) for i, name in enumerate(names) if name not in self._left_out]
        if self.binding is None:
            # Preflight inspects every node of the allocation, including spares.
            return tuple(left)
        if stage.name == RING:
            return tuple(AllocatedNode(node.index, names[node.slurm_index]) for node in self.binding.nodes)
        if stage.name == PREFLIGHT:
            taken = {node.slurm_index for node in self.binding.nodes}
            return tuple(place for place in left if place.index not in taken)
        bound = {node.index: names[node.slurm_index] for node in self.binding.nodes}
        kept = stage.service and self._renewed is not None
        nodes = [node for node in stage.nodes if not kept or node in (self._renewed or ())]
        return tuple(AllocatedNode(node, bound[node]) for node in nodes)

    def lacks_without(self, names: Collection[str]) -> str:
        """Shortage of the allocation without these nodes as well; empty if enough nodes are left."""
        left, need = set(self._runner.nodes()) - self._left_out - set(names), len(self._plan.nodes)
        return "" if len(left) >= need else f"{len(left)} nodes are left of {need} (--spares)"

    def leave_out(self, names: Collection[str]) -> int:
        """Leave out nodes from now on, and forget the binding; return the number of nodes left."""
        self._left_out |= set(names)
        self.binding, self._renewed = None, None
        self._runner.environment.pop(BINDING_VARIABLE, None)
        return len(set(self._runner.nodes()) - self._left_out)

    def renew(self, names: Collection[str]) -> int:
        """Leave out nodes from now on, of which the next preflight gives the logical nodes to spares; all others keep
        their hosts, whose services run on. Return the number of nodes left."""
        assert self.binding is not None
        self._left_out |= set(names)
        every = self._runner.nodes()
        self._renewed = tuple(node.index for node in self.binding.nodes if every[node.slurm_index] in self._left_out)
        return len(set(every) - self._left_out)

    def renews(self, stage: Stage) -> bool:
        """True if logical nodes of the stage get new hosts while the services of the others run on."""
        return bool(set(stage.nodes) & set(self._renewed or ()))

    def is_head(self, name: str) -> bool:
        """True for the host of logical node 0, without which no service can run on."""
        return self.binding is not None and self._runner.nodes()[self.binding.nodes[0].slurm_index] == name

    def prepare(self, stage: Stage) -> None:
        """Called before a stage starts."""
        if stage.name == PREFLIGHT:
            self._canary = release_canary(self._run)
            self._runner.environment[CANARY] = self._canary

    def learn(self, step: Step) -> None:
        """Called after a stage has ended well. Raises RunFailed if too few nodes are fit."""
        if step.stage.name == PREFLIGHT:
            self._examine(step) if self.binding is None else self._refill(step)
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
        switches = self._runner.switches()
        leaves = {place.index: switches[place.name] for place in step.places if place.name in switches}
        self._examined = examine(self._plan, step, self._known(step), leaves)
        self._bind(everyone=any(stage.name == RING for stage in self._plan.stages))

    def _refill(self, step: Step) -> None:
        """Bind spares to the logical nodes that lost their hosts."""
        assert self.binding is not None
        assert self._renewed is not None
        found = refill(self._plan, self.binding, self._renewed, self._examined, step, self._known(step))
        self._examined, binding = found
        self._publish(binding)

    def _known(self, step: Step) -> Known:
        """Facts about the nodes that preflight looked at."""
        places, limits = step.places, self._runner.memory_limits()
        places_of = {report.data["host"]: places[report.rank].index for report in step.of_kind("result")}
        failures = history.node_failures(read_events(self._run), self.name_of)
        often = history.failed_too_often(failures)
        name_of_host = {report.data["host"]: step.name_of(report.rank) for report in step.of_kind("result")}
        return Known(
            job_memory={place.index: limits[place.name] for place in places if place.name in limits},
            moments={places[r.rank].index: (step.started_at, r.arrived) for r in step.of_kind("result")},
            canary=self._canary,
            unseen=[places_of[host] for host in hosts_unseen(self._run, set(places_of))],
            failures={host: failures[name] for host, name in name_of_host.items() if name in often},
        )

    def _drop_slow(self, step: Step) -> None:
        """Bind again, without the nodes whose network is too slow."""
        assert self.binding is not None
        places = [node.slurm_index for node in self.binding.nodes]
        floor = self._plan.cluster.min_network_gbit or 0.0
        slow = slow_nodes(step.of_kind("result"), places, floor)
        self._examined = require_enough(self._plan, replace(self._examined, problems=[*self._examined.problems, *slow]))
        self._bind(everyone=False)

    def _bind(self, *, everyone: bool) -> None:
        end = self._runner.end_time()
        self._publish(bind(self._plan, self._runner, self._examined, end_time=end, everyone=everyone))

    def _publish(self, binding: Binding) -> None:
        """Record the findings, and hand the binding to all later steps."""
        examined = self._examined
        rows = table(examined)
        self._event("preflight", examined.text, stage="preflight", data={"nodes": rows})
        self._say(columns(tuple(rows[0]), [tuple(row.values()) for row in rows]))
        write_report(self._run, examined, rows)
        self._version += 1
        self.binding = binding = binding.model_copy(update={"version": self._version})
        write_binding(self._run, binding)
        # Also passed by variable: a node's file system may show the file late.
        self._runner.environment[BINDING_VARIABLE] = binding_text(self._run, binding)
        hosts = {str(node.index): node.host for node in binding.nodes}
        self._event("binding", f"{len(hosts)} nodes, ports moved by {binding.port_offset}", data={"hosts": hosts})

"""The stage that clears nodes whose supervisors were killed. It is in no plan: the controller starts it when needed."""

from __future__ import annotations

from vime.run.plan import Stage

SWEEP = "sweep"
SWEEP_S = 20.0


def sweep_stage(nodes: tuple[int, ...]) -> Stage:
    """Does nothing: any task clears its node when it ends as the job's last one there."""
    return Stage(name=SWEEP, nodes=nodes, command=("-c", ""), deadline_s=SWEEP_S)

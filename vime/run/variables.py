"""Environment variables with which a runner tells a task where it runs."""

from __future__ import annotations

PLACES = "VIME_PLACES"
"""Nodes of the stage in order, `0=node01,1=node03`: logical node and Slurm's name."""
JOB = "VIME_JOB"
"""Id of the job, or a name for a run on this machine."""
LOCAL_PLACE, LOCAL_RANK = "VIME_LOCAL_PLACE", "VIME_LOCAL_RANK"
"""Place among the stage's nodes, and rank on the node, where no srun sets them."""
HELD = "VIME_HELD"
"""Set for a run in nodes that another run holds: the job is not its own."""

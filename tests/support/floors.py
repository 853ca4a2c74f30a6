"""Allowed imports between rooms of vime, from the ground up, as data. docs/architecture.md shows the same table."""

FLOORS = (
    ("errors", "samples"),
    ("recipe", "system", "slurm"),
    ("cli", "models", "rewards"),
    ("data", "run"),
    ("planning", "rollout", "fp8"),
    ("observe", "checkpoint", "node", "agents"),
    ("launch", "sync"),
    ("megatron", "schedulers"),
    ("train",),
)
"""From the ground up. What stands in no floor is a command: it imports from everywhere, and nothing imports it."""
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

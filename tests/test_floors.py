"""Imports point one way: a room imports from its own floor's room or from floors below, never up, never sideways."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import vime

ROOT = Path(vime.__file__).parent
FLOORS = (
    ("errors", "samples"),
    ("recipe", "system", "slurm"),
    ("cli", "run", "models", "rewards"),
    ("planning", "rollout", "fp8"),
    ("observe", "checkpoint", "node"),
    ("launch", "sync"),
    ("megatron",),
    ("train",),
)
"""From the ground up. What stands in no floor is a command: it imports from everywhere, and nothing imports it."""
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def sources() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT).with_suffix("").parts[0], path


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(module of vime, line) of every import, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vime":
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.startswith("vime."))


def test_every_package_stands_on_a_floor() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages <= FLOOR_OF.keys()


def test_no_import_runs_up_or_sideways() -> None:
    wrong = []
    for room, path in sources():
        for module, line in imports(path):
            other = module.split(".")[1]
            floor, target = FLOOR_OF.get(room, len(FLOORS)), FLOOR_OF.get(other)
            if other == "__version__" or other == room:
                continue
            if target is None or target > floor or (target == floor and room in FLOOR_OF):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)

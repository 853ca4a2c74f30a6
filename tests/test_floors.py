"""Imports point one way: a room imports from its own floor's room or from floors below, never up, never sideways."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import vime
from tests.support.floors import FLOOR_OF, FLOORS

ROOT = Path(vime.__file__).parent
REPOSITORY = Path(__file__).resolve().parents[1]
HEAVY = {
    "aiohttp", "huggingface_hub", "math_verify", "megatron", "mlflow", "msgspec", "numba", "numpy", "pyarrow", "ray",
    "rich", "safetensors", "submitit", "tensorboard", "torch", "transformers", "triton", "vllm",
}  # fmt: skip
"""Packages that take long to load or that a login node lacks: an import inside a function may delay them."""
HIDDEN = {
    "vime.schedulers.slurm": "the controller runs in the job: a login node that queries the queue loads none of it",
    "vime.megatron.backend": "the shim patches torch where there is no GPU, and is loaded nowhere else",
}
"""Modules that import others of vime inside functions although these need nothing heavy, each with its reason."""


def sources() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT).with_suffix("").parts[0], path


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(module of vime, line) of every import, also of those inside functions."""
    for node in ast.walk(tree(path)):
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


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_file(module: str) -> Path | None:
    """File of a module of vime; None where the name is no module."""
    base = ROOT.joinpath(*module.split(".")[1:])
    found = (path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file())
    return next(found, None)


def imported(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Modules that the statement loads; a name out of a module counts as that module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif node.module:
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            yield full if full.startswith("vime.") and module_file(full) else node.module


def split_imports(parsed: ast.Module) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """Imports that loading the module runs, and those inside functions. Imports for type checkers are neither."""
    at_load, hidden = [], []

    def visit(nodes: Iterator[ast.AST], inside: bool) -> None:
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                (hidden if inside else at_load).append(node)
            elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
                inner = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                visit(ast.iter_child_nodes(node), inner)

    visit(iter(parsed.body), False)
    return at_load, hidden


@cache
def heavy_packages(module: str) -> frozenset[str]:
    """Heavy packages that loading the module loads."""
    seen: set[str] = set()
    found: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        path = module_file(name) if name.split(".")[0] == "vime" else None
        if name.split(".")[0] in HEAVY:
            found.add(name.split(".")[0])
        elif path is not None and name not in seen:
            seen.add(name)
            todo += [target for node in split_imports(tree(path))[0] for target in imported(node)]
    return frozenset(found)


def test_an_import_inside_a_function_delays_something_heavy_or_is_listed_with_its_reason() -> None:
    wrong, unused = [], set(HIDDEN)
    for _, path in sources():
        module = ".".join(("vime", *path.relative_to(ROOT).with_suffix("").parts))
        for node in split_imports(tree(path))[1]:
            for target in imported(node):
                if not target.startswith("vime.") or heavy_packages(target) - heavy_packages(module):
                    continue
                unused.discard(module)
                if module not in HIDDEN:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} hides the import of {target}")
    assert not wrong, "\n".join(wrong)
    assert not unused, f"no import is hidden there: {unused}"


def test_commands_import_no_other_command() -> None:
    """`vime` itself loads the module of the verb that it was given."""
    commands = {room for room, path in sources() if path.parent == ROOT and room not in FLOOR_OF} - {"__init__"}
    assert {"submit", "plan", "attach", "status"} <= commands
    for room, path in sources():
        if room in commands:
            others = {module.split(".")[1] for module, _ in imports(path)} & commands
            assert not others, f"{path.name} imports {others}"


@pytest.mark.parametrize("folder", ["tests", "tools"])
def test_tests_and_tools_import_tests_support_alone_and_benches_not_even_that(folder: str) -> None:
    names = {path.stem for path in REPOSITORY.glob("tests/**/test_*.py")}
    wrong = []
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for target in imported(node):
                    of_tests = target.split(".")[0] == "tests"
                    allowed = folder == "tests" and target.startswith("tests.support")
                    if (of_tests and not allowed) or target.split(".")[0] in names:
                        wrong.append(f"{path.relative_to(REPOSITORY)}:{node.lineno} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_names_of_test_modules_are_unique_over_all_folders() -> None:
    names = [path.name for path in REPOSITORY.glob("tests/**/test_*.py")]
    assert len(names) == len(set(names))

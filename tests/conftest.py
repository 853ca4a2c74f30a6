"""Order and options of the whole suite: fast tests first, clusters and engines last."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import patience

pytest_plugins = ["tests.support.fake_checkpoint", "tests.support.leftovers"]
CLUSTER_MODULES = ("test_slurm_", "test_docs_commands", "test_engine_nodes")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run every Slurm fault at 16 nodes, and every layout too")


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """The header has this line although `-q` takes away the rest of it."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        terminal.write_line(f"patience: {patience.SCALE:.2f} times that of a quiet machine ({patience.VARIABLE})")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "e2e" in item.keywords)
    if not config.getoption("--full"):
        later = [item for item in items if "full" in item.keywords]
        items[:] = [item for item in items if item not in later]
        config.hook.pytest_deselected(items=later)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where processes share the tests: a module's run in one process, and those of all that need the cluster too."""
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return "cluster" if Path(module).name.startswith(CLUSTER_MODULES) else module

    return ByModule(config, log)


def restored_environment() -> Iterator[None]:
    """Megatron writes its choice of attention into the environment, where the next model would trip over it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True, scope="module")
def environment_of_modules() -> Iterator[None]:
    yield from restored_environment()


@pytest.fixture(autouse=True)
def environment_of_tests() -> Iterator[None]:
    yield from restored_environment()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, also where the tests run in the background and ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with everything in its path that breaks careless quoting."""
    return tmp_path / 'it\'s a "run" & größe $HOME'


@pytest.fixture(autouse=True)
def reward_plugins_are_importable(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Worker processes of these tests find their plug-ins."""
    if Path(request.fspath).parent.name in ("agents", "rewards", "rollout"):
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "support"))

"""Order and options of the whole suite: fast tests first, clusters and engines last."""

import os
from collections.abc import Iterator

import pytest

pytest_plugins = ["fake_checkpoint"]
CLUSTER_FIXTURES = {"cluster_before", "may_use_cluster"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run every Slurm fault at 16 nodes and every layout too")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests come first. Where several processes share the tests, one of them has all that need the cluster."""
    items.sort(key=lambda item: "e2e" in item.keywords)
    of_cluster = {item.path for item in items if CLUSTER_FIXTURES.intersection(getattr(item, "fixturenames", ()))}
    for item in items:
        group = "cluster" if item.path in of_cluster else str(item.path.relative_to(item.config.rootpath))
        item.add_marker(pytest.mark.xdist_group(group))


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

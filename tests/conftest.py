"""Order and options of the whole suite: fast tests first, clusters and engines last."""

import os
from collections.abc import Iterator

import pytest

pytest_plugins = ["fake_checkpoint"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run every Slurm fault at 16 nodes and every layout too")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "e2e" in item.keywords)


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

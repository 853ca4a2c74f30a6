"""Order and options of the whole suite: fast tests first, clusters and engines last."""

import pytest

pytest_plugins = ["fake_checkpoint"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run every Slurm fault at 16 nodes and every layout too")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "e2e" in item.keywords)

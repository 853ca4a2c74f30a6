"""The cluster of the Slurm tests, down again when the tests brought it up, and the folders of tiny recipes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.main_job import BaseFolder
from tests.support.person import Person
from tests.support.slurm_cluster import DevCluster, bring_up, running


@pytest.fixture(scope="session")
def cluster_before() -> Iterator[None]:
    """Takes down at the end what was not up at the start."""
    before = running()
    yield
    if before is None and running() is not None:
        DevCluster(0).call("down")


@pytest.fixture(scope="module")
def four_nodes(cluster_before: None) -> DevCluster:
    return bring_up(4)


@pytest.fixture(scope="module")
def sixteen_nodes(cluster_before: None) -> DevCluster:
    return bring_up(16)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> BaseFolder:
    """`$BASE_DIR` with the tiny checkpoint and its data."""
    base = BaseFolder(tmp_path_factory.mktemp("base"))
    base.fill()
    return base


@pytest.fixture(scope="session")
def tools_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`$BASE_DIR` of the recipe tiny-tools."""
    base = tmp_path_factory.mktemp("base")
    Person(base).types("tools/make_tiny_tools.py", "--output-dir", str(base), seconds=patience.LEARNING)
    return base

"""The commands of README and docs that need the tiny checkpoint or a cluster, in the order of their pages."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.docs_commands import ROOT, blocks, person
from tests.support.main_job import BaseFolder
from tests.support.slurm_cluster import DevCluster

pytestmark = pytest.mark.e2e

FOLLOWED_S = round(patience.MOMENT)
"""Seconds for which a command that follows a run is watched."""
FOLLOWS = (" -f", " --watch", "vime.attach")


def types(command: str, env: dict[str, str], limit_s: float = patience.GROUP) -> None:
    """A command of a page; one that follows a run is stopped after a while."""
    follows = any(mark in command for mark in FOLLOWS)
    line = f"timeout {FOLLOWED_S} {command}" if follows else command
    done = subprocess.run(["bash", "-c", line], env=env, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
    assert done.returncode in ((0, 124) if follows else (0,)), f"{command}\n{done.stdout[-1500:]}{done.stderr[-1500:]}"


def test_the_tools_convert_the_tiny_checkpoint_there_and_back(tiny_base: BaseFolder, tmp_path: Path) -> None:
    # A base of its own: the tools refuse a folder that exists, and the main job has its own of the same names.
    base = tmp_path / "base"
    base.mkdir()
    (base / "tiny-deepseek-r1").symlink_to(tiny_base.path / "tiny-deepseek-r1")
    env = person(tmp_path, BASE_DIR=str(base))
    for block in blocks("tiny"):
        for command in block.commands:
            types(command, env)
    assert (base / "exported-fp8" / "config.json").is_file()


def test_every_command_of_a_cluster_in_the_order_of_the_pages(
    four_nodes: DevCluster, tiny_base: BaseFolder, tmp_path: Path
) -> None:
    env = person(tmp_path, BASE_DIR=str(tiny_base.path))
    down = []
    for block in blocks("slurm"):
        for command in block.commands:
            if command.startswith("export BASE_DIR="):
                continue  # the page's is the one that quickstart.sh fills
            if command == "slurm/devcluster down":
                down.append(command)
            elif not command.startswith("slurm/devcluster up"):
                types(command, env)
            else:
                # As many nodes as are up already are left as they are; a page's larger cluster has tests of its own.
                types("slurm/devcluster up --nodes 4", env)
    for block in blocks("gpus"):
        for command in block.commands:
            if " --in " in command or "vime.attach" in command:
                continue  # wants a run that holds nodes, or runs with a page for Prometheus
            done = subprocess.run(
                ["bash", "-c", command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=patience.PROCESS
            )
            # Slurm reads a script's options before it looks for nodes: one that it does not know has another error.
            assert "Requested node configuration is not available" in done.stderr, done.stderr
    assert down
    types(down[0], env)

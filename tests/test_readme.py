"""The README tells what is there: its commands run, the options it names exist, and so do the files."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.docs_commands import blocks

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [command for block in blocks() if block.page == "README.md" for command in block.commands]
MODULE = re.compile(r"python -m (vime\.\w+)")


def vime(module: str, *words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "XDG_STATE_HOME": str(folder / "state"), "XDG_CONFIG_HOME": str(folder), "PATH": str(folder)}
    argv = [sys.executable, "-m", module, *words]
    return subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=patience.PROCESS)


@pytest.mark.parametrize("command", sorted(line for line in COMMANDS if "--dry-run" in line))
def test_a_dry_run_of_the_readme_prints_a_plan_and_a_script(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"]
    done = vime(words[2], *words[3:], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=16" in done.stdout


def told_options() -> dict[str, list[str]]:
    """Options in the table of commands by module; every module that the README names."""
    found: dict[str, list[str]] = {module: [] for module in MODULE.findall(TEXT)}
    for line in TEXT.splitlines():
        if line.startswith("| `python -m"):
            name, about = line.strip("|").split("|")
            found[MODULE.findall(name)[0]] = re.findall(r"`(-{1,2}\w[\w-]*)", about)
    return found


@pytest.mark.parametrize(("module", "options"), told_options().items())
def test_commands_and_options_that_the_readme_names_exist(module: str, options: list[str], tmp_path: Path) -> None:
    done = vime(module, "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m {module}")
    for option in options:
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", done.stdout), option


def test_the_table_of_commands_names_options() -> None:
    assert told_options()["vime.logs"] == ["-f", "-n", "--stage", "--node", "--rank"]


def test_commands_of_the_readme_that_start_a_program_name_one_that_is_there() -> None:
    programs = [shlex.split(line)[0] for line in COMMANDS]
    own = {program for program in programs if "/" in program}
    assert own >= {"tools/quickstart.sh", "slurm/devcluster"}
    for program in own:
        assert os.access(ROOT / program, os.X_OK), program


def test_files_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"`((?:slurm|configs|tools|vime)/[\w./-]+)`", TEXT))
    assert {"slurm/deepseek-r1.sbatch", "slurm/deepseek-r1-chain.sbatch", "configs/clusters/example.yaml"} <= named
    for name in named:
        assert (ROOT / name).exists(), name

"""The wheel carries configs/ and slurm/ inside the package, and works installed on its own."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support import patience

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, since building writes beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("vime", "configs", "slurm"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [*command, "-w", str(folder), str(folder / "source")], check=True, capture_output=True, timeout=patience.PROCESS
    )
    return next(folder.glob("*.whl"))


def test_every_package_of_the_tree_is_listed():
    listed = configparser.ConfigParser()
    listed.read(ROOT / "setup.cfg")
    names = {line for line in listed["options"]["packages"].split() if not line.startswith("vime.slurm_")}
    tree = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "vime").rglob("__init__.py")}
    configs = {"vime.configs", *(f"vime.configs.{path.name}" for path in (ROOT / "configs").iterdir() if path.is_dir())}
    assert names == tree | configs


def test_the_wheel_has_every_config_and_slurm_file(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"vime/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    slurm = {f"vime/slurm_templates/{path.name}" for path in (ROOT / "slurm").iterdir() if path.is_file()}
    data = {str(path.relative_to(ROOT)) for path in (ROOT / "vime").rglob("*.[cj]ss*")}
    assert configs | slurm | data <= names


def test_an_installed_wheel_plans_without_the_checkout(wheel: Path, tmp_path: Path):
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, timeout=patience.PROCESS)
    code = "import vime.submit, vime; print(vime.__file__); vime.submit.main(['--nodes', '16', '--dry-run'])"
    env = {**os.environ, "PYTHONPATH": str(target), "PATH": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=patience.PROCESS,
        check=False,
    )
    assert str(target) in result.stdout
    assert "128 ranks, TP8 x CP4 x DP1 x PP4" in result.stdout, result.stderr

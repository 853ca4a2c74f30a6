#!/usr/bin/env python3
"""Make a release: version, changelog, wheel and sdist, both installed into clean environments and tried there.

    .venv/bin/python tools/release.py 0.3.0            build, try, then commit and tag v0.3.0
    .venv/bin/python tools/release.py 0.3.0 --dry-run  build and try, in a copy; the checkout stays as it is

Everything happens in a copy of HEAD first; the checkout gets its commit and tag only when all of it has passed. Nothing
is pushed. Needs a package index, and git with a name and an address. The packages are left in dist/.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vime.errors import BadInput, VimeError

ROOT = Path(__file__).resolve().parents[1]
VERSION_FILE, CHANGELOG = Path("vime/__init__.py"), Path("CHANGELOG.md")
UNRELEASED = "## Unreleased"
_NUMBER = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_VERSION = re.compile(r'^__version__ = "(.*)"$', re.MULTILINE)
LOGIN_NODE = ("tests/recipe", "tests/planning", "tests/run", "tests/slurm", "tests/schedulers")
"""Tests of what runs on a login node, where only the package's own dependencies are installed."""
NOT_THERE = (
    "tests/planning/test_evaluation.py",  # msgspec
    "tests/planning/test_options_alive.py",  # msgspec
    "tests/planning/test_plan_teacher.py",  # torch
    "tests/planning/test_wrong_inputs.py",  # torch
    "tests/run/test_trackers.py",  # wandb, mlflow
    "tests/run/test_metrics.py",  # tensorboard
    "tests/run/test_code.py",  # a checkout
    "tests/schedulers/test_other_scheduler.py",  # a checkout
)
TEST_LIBRARIES = ("pytest", "pytest-asyncio", "pytest-xdist", "hypothesis")
DEADLINE_S = 1200.0


def bumped(text: str, version: str) -> str:
    """Text of `vime/__init__.py` with the new version. Raises BadInput unless it is a later one."""
    found = _VERSION.search(text)
    if found is None:
        raise BadInput(f"{VERSION_FILE} has no __version__")
    if not _NUMBER.fullmatch(version):
        raise BadInput(f"the version is {version!r}: give three numbers, such as 0.3.0")
    old, new = (tuple(map(int, _NUMBER.fullmatch(each)[0].split("."))) for each in (found[1], version))  # pyright: ignore[reportOptionalSubscript]
    if new <= old:
        raise BadInput(f"the version is {version}, and {found[1]} is released: give a later one")
    return _VERSION.sub(f'__version__ = "{version}"', text)


def dated(text: str, version: str, day: datetime.date) -> str:
    """Changelog whose unreleased changes belong to the version. Raises BadInput if there are none."""
    _, found, rest = text.partition(f"{UNRELEASED}\n")
    changes = rest.partition("\n## ")[0].strip()
    if not found or not changes:
        raise BadInput(f'{CHANGELOG} has nothing under "{UNRELEASED}": say there what changes for users')
    return text.replace(f"{UNRELEASED}\n", f"{UNRELEASED}\n\n## {version} ({day.isoformat()})\n", 1)


def call(*words: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Output of a program. Raises VimeError with its last words."""
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=DEADLINE_S)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
        raise VimeError(f"{' '.join(map(str, words[:3]))} exited with {done.returncode}:\n{last}")
    return done.stdout


def installed(package: Path, folder: Path, more: Sequence[str] = ()) -> Path:
    """Folder of the programs of a new environment that holds this package and its dependencies alone."""
    uv = Path(sys.executable).with_name("uv")
    call(uv, "venv", "--quiet", "--python", sys.executable, folder, cwd=package.parent)
    call(uv, "pip", "install", "--quiet", "--python", folder / "bin" / "python", package, *more, cwd=package.parent)
    return folder / "bin"


def try_out(package: Path, version: str, folder: Path, source: Path | None) -> None:
    """Install a package and use it as a login node would; with `source`, run its tests of the login node too."""
    programs = installed(package, folder / f"env-{package.suffix[1:]}", TEST_LIBRARIES if source else ())
    env = {**os.environ, "XDG_CONFIG_HOME": str(folder), "PATH": f"{programs}:{os.environ['PATH']}"}
    if (told := call(programs / "vime", "--version", cwd=folder, env=env).strip()) != f"vime {version}":
        raise VimeError(f"{package.name}: vime --version says {told}")
    plan = call(programs / "vime", "submit", "--nodes", "16", "--dry-run", cwd=folder, env=env)
    if "128 ranks" not in plan:
        raise VimeError(f"{package.name}: the dry run shows no plan of 128 ranks")
    print(f"{package.name}: installed alone, plans the recipe", flush=True)
    if source is not None:
        tests = folder / "tests-alone"
        tests.mkdir()
        for name in ("tests", "configs", "docs", "slurm", "pyproject.toml", "README.md"):
            place = source / name
            (shutil.copytree if place.is_dir() else shutil.copy)(place, tests / name)
        skipped = [f"--ignore={name}" for name in NOT_THERE]
        words = ("-m", "pytest", "-m", "not e2e", "--numprocesses", "2", *skipped, *LOGIN_NODE)
        print(call(programs / "python", *words, cwd=tests, env=env).strip().splitlines()[-1], flush=True)


def release(version: str, *, dry_run: bool) -> None:
    """Build and try a release in a copy of HEAD; then, unless `dry_run`, commit and tag it in the checkout."""
    if changed := call("git", "status", "--porcelain", cwd=ROOT).strip():
        raise BadInput(f"the checkout has changes, the first is {changed.splitlines()[0].strip()}: commit them")
    with tempfile.TemporaryDirectory(prefix="vime-release-") as name:
        folder = Path(name)
        source = folder / "source"
        call("git", "clone", "--quiet", "--no-hardlinks", ROOT, source, cwd=folder)
        new = {
            VERSION_FILE: bumped((source / VERSION_FILE).read_text(), version),
            CHANGELOG: dated((source / CHANGELOG).read_text(), version, datetime.date.today()),
        }
        for path, text in new.items():
            (source / path).write_text(text)
        call(Path(sys.executable).with_name("uv"), "build", "--quiet", "--out-dir", folder / "dist", source, cwd=folder)
        [wheel], [archive] = (list((folder / "dist").glob(kind)) for kind in ("*.whl", "*.tar.gz"))
        try_out(wheel, version, folder, source)
        try_out(archive, version, folder, None)
        if dry_run:
            return
        for package in (wheel, archive):
            (ROOT / "dist").mkdir(exist_ok=True)
            shutil.copy(package, ROOT / "dist" / package.name)
        for path, text in new.items():
            (ROOT / path).write_text(text)
        call("git", "commit", "--quiet", "-m", f"Release {version}", *map(str, new), cwd=ROOT)
        call("git", "tag", "--annotate", f"v{version}", "-m", f"vime {version}", cwd=ROOT)
    print(f"tagged v{version}; dist/ holds {wheel.name} and {archive.name}; push both the commit and the tag")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="the version to release, such as 0.3.0")
    parser.add_argument("--dry-run", action="store_true", help="leave the checkout as it is")
    args = parser.parse_args()
    try:
        release(args.version, dry_run=args.dry_run)
    except VimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.cause)
    return 0


if __name__ == "__main__":
    sys.exit(main())

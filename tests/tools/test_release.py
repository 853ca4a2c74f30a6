"""One command from the checkout to a tagged version whose packages work installed alone."""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

import pytest

from vime.errors import BadInput

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import release  # noqa: E402  # pyright: ignore[reportMissingImports]

from tests.support import patience  # noqa: E402

MODULE = '"""A package."""\n\n__version__ = "0.9.1"\n'
CHANGES = "# Changelog\n\n## Unreleased\n\n### Added\n\n- A thing.\n\n## 0.9.1 (2026-01-01)\n\n- Old.\n"


@pytest.mark.parametrize("version", ["0.9.2", "0.10.0", "1.0.0"])
def test_a_later_version_is_written(version: str) -> None:
    assert release.bumped(MODULE, version) == MODULE.replace("0.9.1", version)


@pytest.mark.parametrize(
    ("version", "said"),
    [("0.9.1", "give a later one"), ("0.9.0", "give a later one"), ("v1", "three numbers"), ("1.0", "three numbers")],
)
def test_any_other_version_is_refused(version: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        release.bumped(MODULE, version)


def test_the_unreleased_changes_get_version_and_day() -> None:
    text = release.dated(CHANGES, "0.10.0", datetime.date(2026, 11, 27))
    assert text == CHANGES.replace("## Unreleased\n", "## Unreleased\n\n## 0.10.0 (2026-11-27)\n")


@pytest.mark.parametrize("text", ["# Changelog\n", CHANGES.replace("### Added\n\n- A thing.\n\n", "")])
def test_a_release_without_changes_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="has nothing under"):
        release.dated(text, "0.10.0", datetime.date(2026, 11, 27))


BLOCKED = """
import sys
LEFT_OUT = {"torch", "numpy", "vllm", "megatron", "ray", "transformers", "safetensors", "numba", "psutil", "aiohttp",
            "math_verify", "msgspec", "pyarrow", "tensorboard", "wandb", "mlflow", "openai", "anthropic"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in LEFT_OUT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_tests_of_the_login_node_need_no_more_than_the_package_does() -> None:
    """Stand-in of the environment that a release makes: libraries that train and generate cannot be imported."""
    left_out = [f"--ignore={name}" for name in release.NOT_THERE]
    words = ["-n", "0", "-q", "--collect-only", "-p", "no:cacheprovider", "-m", "not e2e"]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *words, *left_out, *release.LOGIN_NODE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patience.PROCESS,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert all((ROOT / name).is_file() for name in release.NOT_THERE)


def git(folder: Path, *words: str) -> str:
    name = ("-c", "user.name=Test", "-c", "user.email=test@localhost")
    done = subprocess.run(
        ["git", *name, *words], cwd=folder, check=True, capture_output=True, text=True, timeout=patience.PROCESS
    )
    return done.stdout.strip()


@pytest.mark.e2e
def test_a_release_is_committed_and_tagged_after_its_packages_were_tried(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    git(tmp_path, "clone", "--quiet", str(ROOT), str(checkout))
    git(checkout, "config", "user.name", "Test")
    git(checkout, "config", "user.email", "test@localhost")
    changes = checkout / "CHANGELOG.md"
    if "- " not in changes.read_text().partition("## Unreleased")[2].partition("\n## ")[0]:
        changes.write_text(changes.read_text().replace("# Changelog\n", "# Changelog\n\n## Unreleased\n\n- A thing.\n"))
        git(checkout, "commit", "--quiet", "--all", "-m", "Change a thing")
    before = git(checkout, "rev-parse", "HEAD")
    done = subprocess.run(
        [sys.executable, checkout / "tools" / "release.py", "99.0.0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=patience.LEARNING,
    )
    assert done.returncode == 0, done.stderr
    assert git(checkout, "rev-parse", "v99.0.0^{commit}~1") == before
    assert git(checkout, "status", "--porcelain") == ""
    assert sorted(path.name for path in (checkout / "dist").iterdir()) == [
        "vime-99.0.0-py3-none-any.whl",
        "vime-99.0.0.tar.gz",
    ]
    assert " passed" in done.stdout
    again = subprocess.run(
        [sys.executable, checkout / "tools" / "release.py", "99.0.0"],
        capture_output=True,
        text=True,
        timeout=patience.PROCESS,
    )
    assert again.returncode == 2
    assert "99.0.0 is released" in again.stderr or "has nothing under" in again.stderr

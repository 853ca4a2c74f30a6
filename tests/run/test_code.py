"""The copy of the code in a run folder: its content, name and writing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import patience
from vime.errors import BadInput
from vime.recipe.load import load_recipe
from vime.run import code as snapshot


def test_a_checkout_is_copied_whole_and_small(tmp_path: Path) -> None:
    found = snapshot.look(load_recipe("tiny-qwen3"))
    assert found is not None
    folder = Path(snapshot.folder_of(tmp_path, found))
    snapshot.write(found, folder)
    for name in ("vime/submit.py", "vime/observe/report.css", "configs/recipes/tiny-qwen3.yaml", "pyproject.toml"):
        assert (folder / name).is_file()
    assert not list(folder.rglob("__pycache__"))
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 3 * 10**6
    assert [path.name for path in folder.parent.iterdir()] == [found.name]
    assert folder.stat().st_mode & 0o077 == 0


def test_python_takes_the_copy_and_not_what_stands_in_the_folder_it_starts_in(tmp_path: Path) -> None:
    found = snapshot.look(load_recipe("tiny-qwen3"))
    assert found is not None
    folder = Path(snapshot.folder_of(tmp_path / 'it\'s a "run"', found))
    snapshot.write(found, folder)
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
    code = "from vime.recipe import files; print(files.__file__, files.find('models', 'tiny-qwen3'))"
    root = Path(snapshot.__file__).parents[2]
    for argv in ([sys.executable, "-c", code], [sys.executable, "-m", "vime.submit", "--list-options"]):
        done = subprocess.run(argv, env=env, cwd=root, capture_output=True, text=True, timeout=patience.PROCESS)
        assert done.returncode == 0, done.stderr
        if "-c" in argv:
            assert done.stdout.count(str(folder)) == 2


def test_the_name_follows_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("vime/a.py", "1"), ("configs/b.yaml", "x"), ("pyproject.toml", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(snapshot, "_CHECKOUT", tmp_path)
    recipe = load_recipe("tiny-qwen3")
    first = snapshot.look(recipe)
    assert first == snapshot.look(recipe)
    (tmp_path / "vime/a.py").write_text("2")
    second = snapshot.look(recipe)
    assert first is not None
    assert second is not None
    assert first.name != second.name
    assert [name for name, _ in second.files] == ["configs/b.yaml", "pyproject.toml", "vime/a.py"]


def test_what_is_installed_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_CHECKOUT", tmp_path)
    assert snapshot.look(load_recipe("tiny-qwen3")) is None


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("my_reward:score", ["my_reward.py"]),
        ("group:my_package.inner:score", ["my_package/__init__.py", "my_package/inner.py"]),
        ("json:loads", []),
        ("yaml:load", []),
        ("not_here:score", []),
        ("math", []),
    ],
)
def test_the_plug_ins_of_the_recipe_are_taken_along(
    target: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_package").mkdir()
    for name in ("my_reward.py", "my_package/__init__.py", "my_package/inner.py"):
        (tmp_path / name).write_text("def score(sample): return 1.0\n")
    monkeypatch.chdir(tmp_path)
    own = snapshot.look(load_recipe("tiny-qwen3"))
    more = snapshot.look(load_recipe("tiny-qwen3", ["--rm-type", target]))
    assert own is not None
    assert more is not None
    assert sorted(set(more.files) - set(own.files)) == [(name, str(tmp_path / name)) for name in names]


def test_a_folder_that_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    found = snapshot.look(load_recipe("tiny-qwen3"))
    assert found is not None
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="give another --run-dir"):
        snapshot.write(found, tmp_path / "file" / "code" / found.name)

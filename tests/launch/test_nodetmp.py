"""The node-local folder of a job lives as long as one of its tasks on the node."""

from pathlib import Path

import pytest

from vime.launch.nodetmp import NodeFolder, base_folder, remove_dead


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIME_NODE_TMP", str(tmp_path))


def test_the_last_task_to_leave_removes_the_folder() -> None:
    first, second = NodeFolder("7"), NodeFolder("7")
    assert first.path == second.path
    assert first.path.stat().st_mode & 0o777 == 0o700
    (first.path / "ray").mkdir()
    first.leave()
    assert (second.path / "ray").exists()
    second.leave()
    assert not second.path.exists()


def test_what_a_killed_run_left_is_removed_and_what_a_live_one_uses_is_not() -> None:
    dead, live = NodeFolder("7"), NodeFolder("8")
    import os

    os.close(dead._descriptor)  # as its death does
    assert remove_dead() == ["7"]
    assert not dead.path.exists()
    assert live.path.exists()
    live.leave()


def test_a_link_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    base_folder().symlink_to(tmp_path)
    with pytest.raises(OSError, match="VIME_NODE_TMP"):
        NodeFolder("7")


def test_the_folder_is_its_owners_alone() -> None:
    base_folder().mkdir()
    base_folder().chmod(0o755)
    NodeFolder("7").leave()
    assert base_folder().stat().st_mode & 0o777 == 0o700

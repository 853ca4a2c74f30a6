"""The node-local folder of a job lives as long as one of its tasks on the node, and so does all else of the job."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import patience
from vime.errors import BadInput
from vime.node.leftovers import OWNER
from vime.node.scratch import NodeFolder, base_folder, remove_dead
from vime.system.shared_memory import FOLDER

NOBODY = 65534


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
    os.close(dead._descriptor)  # as its death does
    assert remove_dead() == ["7"]
    assert not dead.path.exists()
    assert live.path.exists()
    live.leave()


def test_a_link_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    base_folder().symlink_to(tmp_path)
    with pytest.raises(BadInput, match="VIME_NODE_TMP"):
        NodeFolder("7")


def test_the_folder_is_its_owners_alone() -> None:
    base_folder().mkdir()
    base_folder().chmod(0o755)
    NodeFolder("7").leave()
    assert base_folder().stat().st_mode & 0o777 == 0o700


# -- what a supervisor's SIGKILL leaves --


@pytest.fixture
def stray(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a process as a stage of a job would, without its supervisor."""
    started: list[subprocess.Popen[bytes]] = []

    def start(job: str, code: str = "pass", user: int | None = None) -> subprocess.Popen[bytes]:
        code = (
            f"import signal, time; signal.signal(15, signal.SIG_IGN); {code}; print('on', flush=True); time.sleep(3600)"
        )
        argv = ["/usr/bin/env", "python3", "-c", code] if user is not None else [sys.executable, "-c", code]
        env = {**os.environ, OWNER: job}
        process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, user=user, cwd="/")
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def segment() -> Iterator[Callable[[str], Path]]:
    made: list[Path] = []

    def make(name: str) -> Path:
        path = FOLDER / f"{name}{os.getpid()}"
        path.write_bytes(b"weights")
        made.append(path)
        return path

    yield make
    for path in made:
        path.unlink(missing_ok=True)


def die(folder: NodeFolder) -> None:
    """As the task's death does."""
    os.close(folder._descriptor)


def test_a_semaphore_of_a_live_process_stays() -> None:
    """Its owner has it mapped under the name that it was made with, not under the one that it is opened by."""
    dead = NodeFolder("7")
    semaphore = multiprocessing.get_context("spawn").Lock()
    path = FOLDER / f"sem.{semaphore._semlock.name.lstrip('/')}"  # pyright: ignore[reportAttributeAccessIssue]
    assert path.exists()
    die(dead)
    assert remove_dead() == ["7"]
    assert path.exists()


def test_processes_and_shared_memory_of_a_dead_job_go_with_its_folder(
    stray: Callable[..., subprocess.Popen[bytes]], segment: Callable[[str], Path]
) -> None:
    dead, live = NodeFolder("7"), NodeFolder("8")
    orphan, neighbour = stray("7"), stray("8")
    left, other = segment("psm_left"), segment("my_own_")
    die(dead)
    assert remove_dead() == ["7"]
    assert orphan.wait(patience.MOMENT) == -9
    assert neighbour.poll() is None
    assert not left.exists()
    assert other.exists(), "no name that a part of vime gives"
    live.leave()


def test_shared_memory_that_somebody_uses_or_that_is_older_than_the_job_stays(segment: Callable[[str], Path]) -> None:
    older = segment("psm_older")
    dead = NodeFolder("7")
    used, held = segment("psm_used"), segment("torch_held")
    with used.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    with held.open("rb"):
        die(dead)
        assert remove_dead() == ["7"]
    assert older.exists()
    assert used.exists()
    assert held.exists()
    mapped.close()


@pytest.mark.parametrize("name", ["vime-run-", "vllm_dist_tp_", "psm_", "torch_1_", "nccl-"])
def test_names_of_every_library_below_are_known(segment: Callable[[str], Path], name: str) -> None:
    dead = NodeFolder("7")
    left = segment(name)
    die(dead)
    assert remove_dead() == ["7"]
    assert not left.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start processes of another user")
def test_what_belongs_to_another_user_stays(
    stray: Callable[..., subprocess.Popen[bytes]], segment: Callable[[str], Path]
) -> None:
    dead = NodeFolder("7")
    foreign, path = stray("7", user=NOBODY), segment("psm_foreign")
    os.chown(path, NOBODY, NOBODY)
    die(dead)
    assert remove_dead() == ["7"]
    assert foreign.poll() is None
    assert path.exists()


def test_the_last_task_of_a_job_ends_what_its_killed_neighbour_left(
    stray: Callable[..., subprocess.Popen[bytes]],
) -> None:
    killed, last = NodeFolder("7"), NodeFolder("7")
    orphan = stray("7")
    die(killed)
    assert remove_dead() == []
    assert orphan.poll() is None
    last.leave()
    assert orphan.wait(patience.MOMENT) == -9

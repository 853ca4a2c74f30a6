"""The binding that a task was handed against the one that its file system shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from vime.errors import BadInput
from vime.run.folder import BINDING_VARIABLE, binding_text, find_binding, read_binding, write_binding
from vime.run.plan import Binding, BoundNode


def binding(job: str = "7", restart: int = 0, version: int = 0, nodes: int = 2) -> Binding:
    bound = tuple(BoundNode(index=i, host=f"gpu{i:04d}", address=f"10.1.{i // 250}.{i % 250}") for i in range(nodes))
    return Binding(job_id=job, restart=restart, version=version, nodes=bound)


def test_without_either_there_is_none(tmp_path: Path) -> None:
    assert find_binding(tmp_path) is None
    with pytest.raises(BadInput):
        read_binding(tmp_path)


@pytest.mark.parametrize(
    ("written", "handed", "taken"),
    [
        (None, binding(), "handed"),
        (binding(), None, "written"),
        (binding(restart=0), binding(restart=1), "handed"),
        (binding(job="6"), binding(job="7"), "handed"),
        (binding(version=0), binding(version=1), "handed"),
        (binding(version=2), binding(version=1), "written"),
    ],
)
def test_the_newer_one_of_this_start_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Binding | None, handed: Binding | None, taken: str
) -> None:
    if written is not None:
        write_binding(tmp_path, written)
    if handed is not None:
        monkeypatch.setenv(BINDING_VARIABLE, binding_text(tmp_path, handed))
    assert find_binding(tmp_path) == read_binding(tmp_path) == {"written": written, "handed": handed}[taken]


def test_another_runs_folder_has_no_handed_binding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BINDING_VARIABLE, binding_text(tmp_path / "other", binding()))
    assert find_binding(tmp_path) is None


def test_a_thousand_nodes_fit_into_a_variable(tmp_path: Path) -> None:
    assert len(binding_text(tmp_path, binding(nodes=1000))) < 64 * 1024

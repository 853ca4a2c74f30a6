"""Which checkpoint of a folder is loaded, and what a save leaves in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vime.errors import BadInput
from vime.megatron import checkpoint_folders as folders
from vime.megatron.checkpoint_folders import STATE_FILE, State, damage, newest_whole
from vime.run.checkpoints import TRACKER, iterations

LARGE = 17 << 20


def saved(root: Path, number: int, *, keep: int = 9, large: bool = False) -> Path:
    """A checkpoint as a save leaves it, with other files than Megatron's."""
    partial = folders.fresh_partial(root, number)
    (partial / "__0_0.distcp").write_bytes(bytes([number]) * (LARGE if large else 5000))
    (partial / ".metadata").write_bytes(b"names")
    return folders.publish(root, State(number, 4 * number, {"cursor": number}), keep=keep, layout={"tp": 2})


def cut(folder: Path) -> None:
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_byte(folder: Path) -> None:
    file = folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose_a_file(folder: Path) -> None:
    (folder / ".metadata").unlink()


def lose_the_state(folder: Path) -> None:
    (folder / STATE_FILE).unlink()


def garble_the_state(folder: Path) -> None:
    (folder / STATE_FILE).write_text('{"files": [')


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (cut, "__0_0.distcp has 4999 bytes, 5000 were written"),
    (flip_a_byte, "__0_0.distcp does not hold what was written"),
    (lose_a_file, ".metadata is missing"),
    (lose_the_state, f"its {STATE_FILE} cannot be read"),
    (garble_the_state, f"its {STATE_FILE} cannot be read"),
]


@pytest.mark.parametrize(("harm", "message"), DAMAGES)
def test_a_damaged_newest_checkpoint_gives_the_one_before_with_a_warning(
    tmp_path: Path, harm: Callable[[Path], None], message: str
) -> None:
    first, second = saved(tmp_path, 4), saved(tmp_path, 8)
    said: list[str] = []
    assert newest_whole(tmp_path, said.append) == second
    assert said == []
    harm(second)
    assert newest_whole(tmp_path, said.append) == first
    assert len(said) == 1
    assert message in said[0]
    assert str(second) in said[0]


def test_without_any_whole_checkpoint_there_is_an_error(tmp_path: Path) -> None:
    cut(saved(tmp_path, 4))
    with pytest.raises(BadInput, match=r"names iteration 4, but no checkpoint in .* is whole: give another --load"):
        newest_whole(tmp_path, lambda _: None)


@pytest.mark.parametrize("place", [0, LARGE // 2, LARGE - 1])
def test_large_files_are_sampled_from_the_first_byte_to_the_last(tmp_path: Path, place: int) -> None:
    folder = saved(tmp_path, 3, large=True)
    assert damage(folder) is None
    with (folder / "__0_0.distcp").open("r+b") as stream:
        # As after a power failure: a megabyte that was never written.
        stream.seek(max(0, min(place, LARGE - (2 << 20))))
        stream.write(bytes(2 << 20))
    assert damage(folder) == "__0_0.distcp does not hold what was written"


def test_a_run_set_back_by_its_tracker_takes_that_checkpoint(tmp_path: Path) -> None:
    first, second = saved(tmp_path, 4), saved(tmp_path, 8)
    (tmp_path / TRACKER).write_text("4")
    said: list[str] = []
    assert newest_whole(tmp_path, said.append) == first
    assert "is newer than" in said[0]
    assert str(second) in said[0]


def test_the_newest_are_kept_and_those_of_a_future_that_was_left_stay(tmp_path: Path) -> None:
    for number in (1, 2, 3, 9):
        saved(tmp_path, number)
    saved(tmp_path, 4, keep=2)
    assert iterations(tmp_path) == [9, 4, 3]
    assert (tmp_path / TRACKER).read_text() == "4"


def test_a_number_that_comes_again_takes_the_old_ones_place(tmp_path: Path) -> None:
    cut(saved(tmp_path, 4))
    again = saved(tmp_path, 4)
    assert damage(again) is None
    assert {path.name for path in tmp_path.iterdir()} == {again.name, TRACKER}


def test_what_a_killed_writer_left_is_no_checkpoint_and_leaves_with_the_next_save(tmp_path: Path) -> None:
    first = saved(tmp_path, 4)
    partial = folders.fresh_partial(tmp_path, 8)
    (partial / "__0_0.distcp").write_bytes(b"half")
    assert newest_whole(tmp_path, pytest.fail) == first
    second = saved(tmp_path, 6)
    assert {path.name for path in tmp_path.iterdir()} == {first.name, second.name, TRACKER}


def test_a_place_that_takes_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(BadInput, match=r"cannot write checkpoints below .*taken/run \(Not a directory\): .*--save"):
        folders.fresh_partial(tmp_path / "taken" / "run", 4)


def test_the_state_comes_back(tmp_path: Path) -> None:
    folder = saved(tmp_path, 4)
    assert folders.read_state(folder) == State(4, 16, {"cursor": 4})
    assert json.loads((folder / STATE_FILE).read_text())["layout"] == {"tp": 2}

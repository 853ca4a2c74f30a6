"""When a stage may be skipped: what is noticed of a change, how little is read for it, what an interruption leaves."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.launch_stub import folder, stub
from vime.errors import BadInput
from vime.launch import gate, marks
from vime.run.plan import Stage
from vime.system.fingerprint import fingerprint

SHARDS, SHARD_BYTES = 163, 4_300_000_000
RUN = "/runs/one"


def write_shards(path: Path, count: int, size: int) -> Path:
    """A checkpoint folder of sparse files with real headers, about as long as DeepSeek-R1's."""
    path.mkdir()
    (path / "config.json").write_text('{"hidden_size": 7168}')
    for number in range(count):
        entries = {
            f"model.layers.{number}.mlp.experts.{i}.down_proj.weight": {
                "dtype": "F8_E4M3",
                "shape": [7168, 2048],
                "data_offsets": [i * 7168 * 2048, (i + 1) * 7168 * 2048],
            }
            for i in range(560)
        }
        header = json.dumps(entries).encode()
        with (path / f"model-{number:05d}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(size)
    return path


def make_stage(source: Path, output: Path, *words: str) -> Stage:
    return stub("cast", "pass", inputs=(folder("in", source),), outputs=(folder("out", output),)).model_copy(
        update={"command": ("-c", "pass", *words)}
    )


@pytest.fixture
def sealed(tmp_path: Path) -> Stage:
    """A stage with three shards in and out, done and sealed."""
    source = write_shards(tmp_path / "fp8", 3, 3_000_000)
    stage = make_stage(source, tmp_path / "bf16")
    gate.prepare(stage, RUN)
    write_shards(tmp_path / "bf16", 3, 6_000_000)
    gate.seal(stage, RUN)
    assert gate.difference(stage, RUN) is None
    return stage


def bytes_read() -> int:
    """By this process so far, from files of any kind."""
    return next(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines() if "rchar" in line)


def test_a_check_of_163_shards_reads_a_thousandth_of_them(tmp_path: Path) -> None:
    stage = make_stage(write_shards(tmp_path / "fp8", 1, 1000), write_shards(tmp_path / "bf16", SHARDS, SHARD_BYTES))
    gate.prepare(stage, RUN)
    # What `prepare` moves aside is nobody's here: the folder was there before.
    gate.seal(stage, RUN)
    before = bytes_read()
    assert gate.difference(stage, RUN) is None
    assert bytes_read() - before <= SHARDS * SHARD_BYTES / 1000


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """In place, and with the old times."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_by_copy(path: Path) -> None:
    """The same bytes and times in another file."""
    copy = path.with_suffix(".copy")
    shutil.copy2(path, copy)
    os.replace(copy, path)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


SHARD = "model-00001.safetensors"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda path: os.truncate(path / SHARD, 2_999_999), "size, time"),
        (lambda path: os.truncate(path / SHARD, 7_000_000), "size, time"),
        (lambda path: touch(path / SHARD), "another time"),
        (lambda path: replace_by_copy(path / SHARD), "another inode"),
        (lambda path: overwrite(path / SHARD, 100, b"?"), "another content"),
        (lambda path: overwrite(path / SHARD, path.joinpath(SHARD).stat().st_size - 1, b"?"), "another content"),
        (lambda path: overwrite(path / "config.json", 16, b"7169"), "config.json has another content"),
        (lambda path: (path / SHARD).unlink(), f"{SHARD} is gone"),
        (lambda path: (path / "more").touch(), "more is new"),
    ],
    ids=["truncated", "longer", "time", "replaced", "header", "end", "config", "removed", "added"],
)
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_change_is_noticed_and_named(sealed: Stage, side: str, change: Callable[[Path], None], told: str) -> None:
    change(Path(getattr(sealed, side)[0].path))
    why = gate.difference(sealed, RUN)
    assert why is not None
    assert told in why
    assert ("other inputs" in why) == (side == "inputs")


def test_a_file_that_was_filled_only_in_part_is_noticed_under_its_old_time(tmp_path: Path) -> None:
    """As a copy that was interrupted leaves it: the length is there, blocks in the middle are not."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * 30_000_000)
    before = fingerprint(path)
    overwrite(path, 10_000_000, bytes(10_000_000))
    after = fingerprint(path)
    assert replace(before, digest=after.digest) == after
    assert before != after


def test_a_manifest_with_digests_of_version_2_counts_by_size_time_and_inode(sealed: Stage) -> None:
    manifest = Path(sealed.outputs[0].path, marks.MANIFEST)
    content = json.loads(manifest.read_text())
    for found in (content["files"], *content["inputs"].values()):
        for mark in found.values():
            mark[3] = "digest of an older vime"
    manifest.write_text(json.dumps({**content, "version": 2}))
    assert gate.difference(sealed, RUN) is None
    touch(Path(sealed.outputs[0].path) / SHARD)
    assert "another time" in (gate.difference(sealed, RUN) or "")


def test_another_command_is_another_stage(sealed: Stage) -> None:
    other = make_stage(Path(sealed.inputs[0].path), Path(sealed.outputs[0].path), "--world-size", "2")
    assert "made by another command" in (gate.difference(other, RUN) or "")


def test_the_run_folder_in_a_command_does_not_count(sealed: Stage) -> None:
    one, two = (make_stage(Path("a"), Path("b"), f"{run}/log") for run in ("/runs/1", "/runs/2"))
    assert gate.fingerprint(one, "/runs/1") == gate.fingerprint(two, "/runs/2")


def test_notes_of_a_download_are_no_content(sealed: Stage) -> None:
    notes = Path(sealed.inputs[0].path, ".cache", "huggingface")
    notes.mkdir(parents=True)
    (notes / "x.metadata").write_text("etag")
    assert gate.difference(sealed, RUN) is None


def test_a_manifest_cut_at_any_byte_verifies_nothing(sealed: Stage) -> None:
    manifest = Path(sealed.outputs[0].path, marks.MANIFEST)
    whole = manifest.read_bytes()
    for length in range(0, len(whole), 7):
        manifest.write_bytes(whole[:length])
        assert gate.difference(sealed, RUN) is not None


def test_what_the_interrupted_stage_left_stays_for_it_to_go_on(tmp_path: Path) -> None:
    source, output = write_shards(tmp_path / "fp8", 1, 100_000), tmp_path / "torch_dist"
    stage = make_stage(source, output)
    assert gate.prepare(stage, RUN) == []
    output.mkdir()
    (output / "half").touch()
    assert gate.prepare(stage, RUN) == []
    assert (output / "half").exists()
    assert gate.difference(stage, RUN) == f"{output} has no manifest"
    # The same of other inputs, or by another command, is in the way.
    (source / "config.json").write_text("{}")
    assert len(gate.prepare(stage, RUN)) == 1
    assert not output.exists()


def test_inputs_that_change_under_a_stage_are_an_error(sealed: Stage) -> None:
    gate.prepare(sealed, RUN)
    write_shards(Path(sealed.outputs[0].path), 1, 1000)
    touch(Path(sealed.inputs[0].path) / SHARD)
    with pytest.raises(BadInput, match=rf"changed while cast read it \({SHARD} has another time"):
        gate.seal(sealed, RUN)
    assert gate.difference(sealed, RUN) is not None


@pytest.mark.parametrize(("folder_mode", "mode"), [(0o755, 0o644), (0o750, 0o640), (0o700, 0o600)])
def test_a_manifest_is_as_readable_as_its_artefact(tmp_path: Path, folder_mode: int, mode: int) -> None:
    stage = make_stage(write_shards(tmp_path / "fp8", 1, 1000), tmp_path / "bf16")
    gate.prepare(stage, RUN)
    write_shards(tmp_path / "bf16", 1, 1000).chmod(folder_mode)
    gate.seal(stage, RUN)
    assert (tmp_path / "bf16" / marks.MANIFEST).stat().st_mode & 0o777 == mode


def test_what_another_user_keeps_from_us_is_not_verified_and_not_moved(
    sealed: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a second person in a shared folder; the tests' own user may be root, who can read everything."""
    manifest = Path(sealed.outputs[0].path, marks.MANIFEST)
    read = Path.read_text

    def refuse(path: Path, *args: str, **options: str) -> str:
        if path == manifest:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert gate.difference(sealed, RUN) == f"{manifest} cannot be read (Permission denied), so nothing is verified"
    with pytest.raises(BadInput, match=r"ask the owner of the folder .* or give a --base-dir of your own"):
        gate.prepare(sealed, RUN)
    assert manifest.exists()


def test_one_run_at_a_time_makes_the_outputs(tmp_path: Path) -> None:
    stage = make_stage(tmp_path / "fp8", tmp_path / "base" / "bf16")
    first, second = gate.OutputLock(stage), gate.OutputLock(stage)
    assert first.take()
    assert not second.take()
    first.release()
    assert second.take()
    second.release()


def test_a_file_system_without_locks_lets_everybody_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(gate.fcntl, "flock", none)
    assert gate.OutputLock(make_stage(tmp_path / "fp8", tmp_path / "bf16")).take()

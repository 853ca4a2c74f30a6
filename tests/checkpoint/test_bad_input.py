"""A bad source, layout or target gives exit code 2, names tensor and file, and nothing is written."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import tiny_hf
from vime.checkpoint import cast, convert
from vime.checkpoint.ranks import Ranks

FILE = "model-00002-of-00003.safetensors"
HF = tiny_hf.with_fp8(tiny_hf.DEEPSEEK)


def run(tool: str, source: Path, target: Path, *flags: str) -> int:
    if tool == "cast":
        return cast.main(["--input-fp8-hf-path", str(source), "--output-bf16-hf-path", str(target), *flags])
    return convert.main(["--hf-checkpoint", str(source), "--save", str(target), *flags])


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_hf.write_checkpoint(tmp_path / "source", HF)


def first(source: Path, quantised: bool = True) -> str:
    """A tensor of the second file."""
    found = {name: value for name, value in load_file(source / FILE).items() if not name.endswith("_scale_inv")}
    return next(name for name, value in found.items() if (value.dtype == torch.float8_e4m3fn) == quantised)


def change(source: Path, name: str, to: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> None:
    """Puts other tensors in the place of one of the second file, in file and index."""
    content = load_file(source / FILE)
    made = to(content.pop(name))
    save_file({**content, **made}, source / FILE)
    index = source / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map[name]
    index.write_text(json.dumps({"weight_map": weight_map | dict.fromkeys(made, FILE)}))


def lost_scale(source: Path) -> str:
    name = first(source)
    index = source / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map[f"{name}_scale_inv"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    return f"{FILE}: {name} is stored in fp8 but no file has {name}_scale_inv"


def missing_shard(source: Path) -> str:
    (source / FILE).unlink()
    return f"{source / FILE} is missing"


def truncated(source: Path) -> str:
    os.truncate(source / FILE, (source / FILE).stat().st_size - 1)
    return f"{source / FILE} is truncated"


def wrong_type(source: Path) -> str:
    name = first(source, quantised=False)
    change(source, name, lambda value: {name: value.to(torch.int32)})
    return f"{FILE}: {name} has the type torch.int32"


def type_that_is_unknown(source: Path) -> str:
    name = first(source)
    change(source, name, lambda value: {name: value.to(torch.float8_e5m2)})
    return f"{FILE}: {name} has the type F8_E5M2, which vime does not read"


def wrong_shape(source: Path) -> str:
    name = first(source, quantised=False)
    change(source, name, lambda value: {name: value[:1].clone()})
    return f"{FILE}: {name} has the shape [1"


def unknown_name(source: Path) -> str:
    name = first(source, quantised=False)
    change(source, name, lambda value: {name: value, "model.layers.0.extra.weight": torch.zeros(1)})
    return f"{FILE}: model.layers.0.extra.weight is not a tensor of a DeepseekV3ForCausalLM"


def missing_tensor(source: Path) -> str:
    name = first(source, quantised=False)
    change(source, name, lambda value: {})
    return f"{source} has no tensor {name}"


FAULTS = [
    lost_scale,
    missing_shard,
    truncated,
    wrong_type,
    type_that_is_unknown,
    wrong_shape,
    unknown_name,
    missing_tensor,
]


@pytest.mark.parametrize("tool", ["cast", "convert"])
@pytest.mark.parametrize("spoil", FAULTS)
def test_a_source_that_is_not_right(tmp_path: Path, capsys, source: Path, tool: str, spoil) -> None:
    told = spoil(source)
    assert run(tool, source, tmp_path / "target") == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("flag", "size", "world", "told"),
    [
        ("--tensor-model-parallel-size", 3, 3, "4 attention heads do not divide by --tensor-model-parallel-size 3"),
        ("--expert-model-parallel-size", 3, 3, "8 experts do not divide by --expert-model-parallel-size 3"),
        ("--pipeline-model-parallel-size", 3, 3, "4 layers do not divide over 3 pipeline stages"),
        ("--pipeline-model-parallel-size", 2, 3, "3 ranks cannot hold TP1 x CP1 x PP2"),
    ],
)
def test_a_layout_that_the_model_does_not_allow(
    tmp_path: Path, capsys, monkeypatch, source: Path, flag: str, size: int, world: int, told: str
) -> None:
    """As the first of some ranks sees it; the others are not needed for the answer."""
    monkeypatch.setattr(convert, "from_environment", lambda: Ranks(0, world, "127.0.0.1", 1))
    monkeypatch.setattr(convert, "process_group", lambda *_: contextlib.nullcontext())
    assert run("convert", source, tmp_path / "target", flag, str(size)) == 2
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("tool", ["cast", "convert"])
def test_a_target_in_use(tmp_path: Path, capsys, source: Path, tool: str) -> None:
    target = tmp_path / "target"
    name = "notes.txt" if tool == "cast" else "latest_checkpointed_iteration.txt"
    target.mkdir()
    (target / name).write_text("20")
    assert run(tool, source, target) == 2
    assert str(target) in capsys.readouterr().err
    assert [path.name for path in target.iterdir()] == [name]


@pytest.mark.parametrize("tool", ["cast", "convert"])
def test_a_disk_that_is_too_small_is_told_before_the_first_byte(
    tmp_path: Path, capsys, monkeypatch, source: Path, tool: str
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert run(tool, source, tmp_path / "target") == 2
    assert "0.0 GiB free, but" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]

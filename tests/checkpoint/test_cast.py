"""Block fp8 to bf16: what comes out, how ranks share it, what an interruption leaves, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.support import patience
from tests.support.tiny_hf import (
    DEEPSEEK,
    QWEN3,
    random_tensors,
    stored_tensors,
    with_fp8,
    write_checkpoint,
    write_folder,
)
from vime.checkpoint import cast as cast_module
from vime.checkpoint.cast import cast_to_bf16, verify_cast
from vime.errors import BadInput, DeadlineExceeded
from vime.fp8.quantise import dequantise, quantise, scale_name

TOOL = Path(__file__).parents[2] / "tools" / "fp8_cast_bf16.py"
ATTENTION = "model.layers.0.self_attn.o_proj.weight"


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor, read by the safetensors library along the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in set(index.values())}
    assert sum(map(len, files.values())) == len(index)
    return {name: files[file][name] for name, file in index.items()}


def expected(stored: dict[str, torch.Tensor], block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The format's rule: bf16(fp32(q) * scale), everything else as it is."""
    out = {}
    for name, value in stored.items():
        if value.dtype == torch.float8_e4m3fn:
            scale = stored[scale_name(name)].float()
            wide = scale.repeat_interleave(block[0], 0)[: value.shape[0]].repeat_interleave(block[1], 1)
            out[name] = (value.float() * wide[:, : value.shape[1]]).to(torch.bfloat16)
        elif not name.endswith("_scale_inv"):
            out[name] = value
    return out


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    block=st.sampled_from([(16, 16), (128, 128), (24, 40), (1, 64)]),
    files=st.integers(2, 7),
    e8m0=st.booleans(),
    ranks=st.integers(1, 3),
)
def test_any_block_size_and_any_spread_over_files(tmp_path_factory, block, files, e8m0, ranks) -> None:
    folder = tmp_path_factory.mktemp("cast")
    hf = with_fp8(DEEPSEEK, block)
    stored = stored_tensors(hf, random_tensors(hf))
    if e8m0:
        stored = {
            name: value.to(torch.float8_e8m0fnu) if name.endswith("_scale_inv") else value
            for name, value in stored.items()
        }
    write_folder(folder / "in", hf, stored, files=files)
    for rank in reversed(range(1, ranks)):
        thread = threading.Thread(
            target=cast_to_bf16, args=(folder / "in", folder / "out"), kwargs={"rank": rank, "world_size": ranks}
        )
        thread.start()
    cast_to_bf16(folder / "in", folder / "out", rank=0, world_size=ranks)
    assert same(read(folder / "out"), expected(stored, block))


def test_the_output_is_a_plain_bf16_checkpoint(tmp_path: Path) -> None:
    hf = with_fp8(DEEPSEEK)
    source = write_folder(
        tmp_path / "in",
        hf,
        stored_tensors(hf, random_tensors(hf)),
        files=2,
        extra={"generation_config.json": "{}", "tokenizer_config.json": "{}", "chat_template.jinja": "x"},
    )
    cast_to_bf16(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == DEEPSEEK
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"} <= names
    assert not [name for name in names if name.startswith(".")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_an_interrupted_cast_goes_on_with_the_shards_that_are_left(tmp_path: Path, monkeypatch) -> None:
    hf = with_fp8(DEEPSEEK)
    source = write_checkpoint(tmp_path / "in", hf, files=4)
    written = []
    whole = cast_module._write_shard

    def interrupted(checkpoint, shard, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard.name)
        whole(checkpoint, shard, *rest)

    monkeypatch.setattr(cast_module, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cast_to_bf16(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(cast_module, "_write_shard", lambda c, s, *rest: (written.append(s.name), whole(c, s, *rest)))
    cast_to_bf16(source, tmp_path / "out")
    assert len(written) == len(set(written)) == 4
    stored = {name: value for file in source.glob("*.safetensors") for name, value in load_file(file).items()}
    assert same(read(tmp_path / "out"), expected(stored, (16, 16)))
    assert cast_to_bf16(source, tmp_path / "out") == 0


def test_what_was_cast_from_another_source_is_not_kept(tmp_path: Path, monkeypatch) -> None:
    hf = with_fp8(DEEPSEEK)
    monkeypatch.setattr(cast_module, "_publish", lambda *_: None)
    cast_to_bf16(write_checkpoint(tmp_path / "in", hf, seed=1), tmp_path / "out")
    monkeypatch.undo()
    source = write_checkpoint(tmp_path / "other", hf, seed=2)
    cast_to_bf16(source, tmp_path / "out")
    stored = {name: value for file in source.glob("*.safetensors") for name, value in load_file(file).items()}
    assert same(read(tmp_path / "out"), expected(stored, (16, 16)))


@pytest.mark.parametrize("changed", ["out", "in"])
def test_a_deep_verification_finds_one_changed_bit_anywhere(tmp_path: Path, changed: str) -> None:
    source = write_checkpoint(tmp_path / "in", with_fp8(DEEPSEEK), files=3)
    cast_to_bf16(source, tmp_path / "out")
    for rank in range(2):
        verify_cast(source, tmp_path / "out", rank=rank, world_size=2)
    file = tmp_path / changed / "model-00002-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) - 1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(BadInput, match=r"00002-of-00003.safetensors: model\..* is not what the cast makes of"):
        verify_cast(source, tmp_path / "out")
    # The rank that has other files does not read this one.
    verify_cast(source, tmp_path / "out", rank=0, world_size=2) if changed == "out" else None


def test_a_shard_that_was_cut_later_is_not_taken_for_done(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", with_fp8(DEEPSEEK), files=3)
    cast_to_bf16(source, tmp_path / "out")
    file = tmp_path / "out" / "model-00002-of-00003.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(BadInput, match="exists and is not empty"):
        cast_to_bf16(source, tmp_path / "out")


def test_large_tensors_are_cast_in_pieces(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cast_module, "PIECE_BYTES", 4096)
    hf = with_fp8(DEEPSEEK, (24, 40))
    stored = stored_tensors(hf, random_tensors(hf))
    cast_to_bf16(write_folder(tmp_path / "in", hf, stored, files=2), tmp_path / "out")
    assert same(read(tmp_path / "out"), expected(stored, (24, 40)))
    name = ATTENTION
    assert torch.equal(
        read(tmp_path / "out")[name], dequantise(stored[name], stored[scale_name(name)].float(), (24, 40))
    )


def test_a_rank_that_never_comes_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", with_fp8(DEEPSEEK), files=3)
    with pytest.raises(DeadlineExceeded, match=r"no other rank finished model-00002-of-00003.safetensors"):
        cast_to_bf16(source, tmp_path / "out", rank=0, world_size=2, stall_s=0.3)
    assert not (tmp_path / "out").exists()
    cast_to_bf16(source, tmp_path / "out")


def test_the_tool_takes_its_place_from_slurm_and_reports_progress(tmp_path: Path, monkeypatch, capsys) -> None:
    source = write_checkpoint(tmp_path / "in", with_fp8(DEEPSEEK), files=2)
    paths = ["--input-fp8-hf-path", str(source), "--output-bf16-hf-path", str(tmp_path / "out")]
    with monkeypatch.context() as step:
        for name, value in {"SLURM_STEP_ID": "3", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}.items():
            step.setenv(name, value)
        assert cast_module.main([*paths, "--stall-timeout", "0.1"]) == 17
        assert "vime_cast.json" in capsys.readouterr().err
    # In a batch script outside of a step there is one process, however many tasks the job has.
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert cast_module.main(paths) == 0
    assert "cast, rank 0 of 1: 100%" in capsys.readouterr().err
    assert cast_module.main([*paths, "--verify"]) == 0
    assert "verify, rank 0 of 1: 100%" in capsys.readouterr().err
    assert cast_module.main([*paths, "--rank", "1"]) == 2
    assert "give both or neither" in capsys.readouterr().err


def test_the_tool_runs_as_a_script(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--input-fp8-hf-path", str(tmp_path), "--output-bf16-hf-path", "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience.PROCESS)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path} has neither model.safetensors.index.json nor model.safetensors: " + (
        "give the folder of an HF checkpoint\n"
    )


def without(source: Path, name: str) -> None:
    """Take a tensor out of a checkpoint's files and index."""
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        if tensors.pop(name, None) is not None:
            save_file(tensors, file)
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][name]
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda source: without(source, scale_name(ATTENTION)), f"no file has {scale_name(ATTENTION)}"),
        (lambda source: without(source, ATTENTION), f"{scale_name(ATTENTION)} is a scale, but its weight is not"),
        (lambda source: next(source.glob("*2-of*.safetensors")).unlink(), "00002-of-00003.safetensors is missing"),
        (lambda source: os.truncate(file := next(source.glob("*2-of*")), file.stat().st_size - 1), "truncated"),
        (lambda source: (source / "config.json").write_text(json.dumps(DEEPSEEK)), "no quantization_config"),
        (lambda source: (source / "config.json").unlink(), "config.json"),
    ],
)
def test_a_bad_source_is_named_and_nothing_is_written(tmp_path: Path, spoil, says: str) -> None:
    source = write_checkpoint(tmp_path / "in", with_fp8(DEEPSEEK), files=3)
    spoil(source)
    with pytest.raises(BadInput, match=says.replace(".", r"\.")) as caught:
        cast_to_bf16(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_scale_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", with_fp8(DEEPSEEK), files=1)
    tensors = load_file(source / "model.safetensors")
    tensors[scale_name(ATTENTION)][-1, -1] = float("nan")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(BadInput, match=f"{scale_name(ATTENTION)} holds NaN or infinity"):
        cast_to_bf16(source, tmp_path / "out")


OTHER_MODELS = {
    "an unknown architecture": {"architectures": ["SomeForCausalLM"]},
    "no architecture": {"model_type": "some"},
    "an option that vime does not train": {"architectures": ["Qwen3ForCausalLM"], "attention_bias": True},
}


@pytest.mark.parametrize("config", OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_a_model_that_vime_does_not_train_is_cast_too(tmp_path: Path, config: dict) -> None:
    """Any names, ranks and types; what is not stored in fp8 stays as it is."""
    block = (16, 24)
    hf = {**QWEN3, **with_fp8({}, block), **config} if "attention_bias" in config else {**with_fp8({}, block), **config}
    draw = torch.Generator().manual_seed(3)
    tensors: dict[str, torch.Tensor] = {
        "blocks.0.mixer.bias": torch.randn(7, generator=draw).to(torch.float16),
        "blocks.0.conv": torch.randn(3, 2, 5, generator=draw).to(torch.bfloat16),
        "blocks.0.steps": torch.tensor(3),
    }
    for name, shape in {"blocks.0.in.weight": (40, 50), "blocks.1.experts.7.up.weight": (16, 24)}.items():
        q, scale = quantise(torch.randn(shape, generator=draw), block)
        tensors |= {name: q, scale_name(name): scale}
    source = write_folder(tmp_path / "in", hf, tensors, files=2)
    assert cast_module.main(["--input-fp8-hf-path", str(source), "--output-bf16-hf-path", str(tmp_path / "out")]) == 0
    assert same(read(tmp_path / "out"), expected(tensors, block))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    verify_cast(source, tmp_path / "out")


def test_fused_experts_in_fp8_are_named(tmp_path: Path) -> None:
    fused = {"experts.up": torch.zeros(2, 16, 16).to(torch.float8_e4m3fn), "experts.up_scale_inv": torch.ones(2, 1, 1)}
    source = write_folder(tmp_path / "in", with_fp8({"model_type": "some"}), fused, files=1)
    with pytest.raises(BadInput, match=r"experts.up \[2, 16, 16\] is stored in fp8 but is no matrix"):
        cast_to_bf16(source, tmp_path / "out")


def test_a_source_in_bf16_and_a_target_in_use_are_refused(tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", DEEPSEEK)
    with pytest.raises(BadInput, match="holds no fp8 tensors"):
        cast_to_bf16(plain, tmp_path / "out")
    source = write_checkpoint(tmp_path / "in", with_fp8(DEEPSEEK))
    with pytest.raises(BadInput, match="exists and is not empty"):
        cast_to_bf16(source, plain)
    with pytest.raises(BadInput, match="rank 2 of 2"):
        cast_to_bf16(source, tmp_path / "out", rank=2, world_size=2)


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(tmp_path: Path, monkeypatch) -> None:
    source = write_checkpoint(tmp_path / "in", with_fp8(DEEPSEEK))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(BadInput, match="make room"):
        cast_to_bf16(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]

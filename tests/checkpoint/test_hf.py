"""Reading and writing HF checkpoint folders, against the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.support import tiny_hf
from vime.checkpoint.hf import HFCheckpoint
from vime.checkpoint.hf_writer import HFWriter
from vime.checkpoint.safetensors_file import Spec
from vime.errors import BadInput
from vime.fp8.quantise import dequantise, quantise
from vime.models.families import params_of

FP8 = tiny_hf.with_fp8(tiny_hf.DEEPSEEK)
QUANTISED = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory) -> Path:
    return tiny_hf.write_checkpoint(tmp_path_factory.mktemp("hf") / "model", FP8)


@pytest.fixture
def folder(tmp_path) -> Path:
    """One that a test may break."""
    return tiny_hf.write_checkpoint(tmp_path / "model", FP8)


def file_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]


def rewrite(folder: Path, tensor: str, change) -> Path:
    """Changes one tensor in its file; None removes it there and in the index."""
    file = file_of(folder, tensor)
    content = load_file(file)
    value = change(content.pop(tensor))
    if value is not None:
        content[tensor] = value
    save_file(content, file)
    if value is None:
        index = folder / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        del weight_map[tensor]
        index.write_text(json.dumps({"weight_map": weight_map}))
    return file


def test_reads_what_the_library_wrote(fp8_folder):
    checkpoint = HFCheckpoint(fp8_folder)
    checkpoint.check(params_of(checkpoint.config))
    for file in fp8_folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.equal(checkpoint.stored(name).view(torch.uint8), tensor.view(torch.uint8)), name


def test_fp8_tensors_come_out_as_bf16(fp8_folder):
    checkpoint = HFCheckpoint(fp8_folder)
    original = tiny_hf.random_tensors(FP8)[QUANTISED]
    assert checkpoint.is_quantised(QUANTISED)
    assert torch.equal(checkpoint.tensor(QUANTISED), dequantise(*quantise(original, (16, 16)), (16, 16)))
    assert not checkpoint.is_quantised("lm_head.weight")
    assert torch.equal(checkpoint.tensor("lm_head.weight"), tiny_hf.random_tensors(FP8)["lm_head.weight"])


@settings(deadline=None)
@given(data=st.data())
def test_any_box_equals_the_box_of_the_whole(fp8_folder, data):
    checkpoint = HFCheckpoint(fp8_folder)
    name = data.draw(st.sampled_from([QUANTISED, "lm_head.weight", "model.layers.1.mlp.experts.3.down_proj.weight"]))
    whole = checkpoint.tensor(name, torch.float32)
    start = [data.draw(st.integers(0, n - 1)) for n in whole.shape]
    size = [data.draw(st.integers(1, n - a)) for n, a in zip(whole.shape, start, strict=True)]
    box = whole[start[0] : start[0] + size[0], start[1] : start[1] + size[1]]
    assert torch.equal(checkpoint.read(name, start, size, torch.float32), box)


def test_a_missing_file_is_named(folder):
    file = file_of(folder, QUANTISED)
    file.unlink()
    with pytest.raises(BadInput, match=f"{file.name} is missing"):
        HFCheckpoint(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(folder, keep):
    file = file_of(folder, QUANTISED)
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    with pytest.raises(BadInput, match=file.name):
        HFCheckpoint(folder)


def test_a_missing_scale_is_named_with_its_tensor(folder):
    rewrite(folder, QUANTISED + "_scale_inv", lambda _: None)
    checkpoint = HFCheckpoint(folder)
    with pytest.raises(BadInput, match=f"{QUANTISED} is stored in fp8 but no file has"):
        checkpoint.check(params_of(checkpoint.config))
    with pytest.raises(BadInput, match=QUANTISED):
        checkpoint.tensor(QUANTISED)


@pytest.mark.parametrize(
    ("tensor", "change", "told"),
    [
        (QUANTISED + "_scale_inv", lambda t: t[:1].clone(), r"_scale_inv is .*needs \[4, 3\]"),
        ("lm_head.weight", lambda t: t.to(torch.int32), "lm_head.weight has the type torch.int32"),
        ("lm_head.weight", lambda t: t[:100].clone(), r"lm_head.weight has the shape \[100, 64\]"),
        ("lm_head.weight", lambda _: None, "no tensor lm_head.weight"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(folder, tensor, change, told):
    rewrite(folder, tensor, change)
    checkpoint = HFCheckpoint(folder)
    with pytest.raises(BadInput, match=told):
        checkpoint.check(params_of(checkpoint.config))


def test_an_unknown_tensor_is_named(tmp_path):
    stored = {**tiny_hf.random_tensors(tiny_hf.QWEN3), "model.extra.weight": torch.zeros(1)}
    checkpoint = HFCheckpoint(tiny_hf.write_folder(tmp_path / "model", tiny_hf.QWEN3, stored))
    with pytest.raises(BadInput, match=r"model\.extra\.weight is not a tensor of a Qwen3ForCausalLM"):
        checkpoint.check(params_of(checkpoint.config))


def test_a_tied_model_may_carry_a_copy_of_its_head(tmp_path):
    stored = tiny_hf.random_tensors(tiny_hf.QWEN3)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    checkpoint = HFCheckpoint(tiny_hf.write_folder(tmp_path / "model", tiny_hf.QWEN3, stored))
    checkpoint.check(params_of(checkpoint.config))


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(BadInput, match="neither"):
        HFCheckpoint(tmp_path)
    with pytest.raises(BadInput, match="not a folder"):
        HFCheckpoint(tmp_path / "absent")


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_the_library_reads_what_was_written(tmp_path, max_shard_bytes):
    tensors = tiny_hf.random_tensors(tiny_hf.DEEPSEEK)
    source = tiny_hf.write_folder(tmp_path / "source", tiny_hf.DEEPSEEK, tensors, extra={"tokenizer_config.json": "{}"})
    specs = [Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = HFWriter(tmp_path / "copy", specs, max_shard_bytes=max_shard_bytes)
    writer.create()
    for name in reversed(list(tensors)):
        writer.write(name, tensors[name])
    assert not (tmp_path / "copy").exists()
    writer.publish(copy_from=source)
    found = {}
    for file in (tmp_path / "copy").glob("*.safetensors"):
        found.update(load_file(file))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert (tmp_path / "copy" / "tokenizer_config.json").exists()
    assert HFCheckpoint(tmp_path / "copy").config == HFCheckpoint(source).config
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_target_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "something").touch()
    with pytest.raises(BadInput, match="not empty"):
        HFWriter(tmp_path / "copy", [Spec("a", torch.float32, (1,))]).create()


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(tmp_path):
    writer = HFWriter(tmp_path / "copy", [Spec("a", torch.float32, (1 << 60,))])
    with pytest.raises(BadInput, match="make room"):
        writer.create()
    assert list(tmp_path.iterdir()) == []

"""Conversion to torch_dist and back: bit-equal, at any layout, and nothing half-written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import patience, tiny_hf
from tests.support.torchrun import TOOL, torchrun
from vime.checkpoint import convert as tool
from vime.checkpoint import dist_save
from vime.checkpoint.convert import deal_out
from vime.checkpoint.dist_save import Chunk
from vime.checkpoint.export import export
from vime.checkpoint.export import main as export_main
from vime.checkpoint.hf import HFCheckpoint
from vime.checkpoint.ranks import Ranks, process_group
from vime.checkpoint.torch_dist import TorchDistReader
from vime.errors import BadInput
from vime.models.config import ModelConfig
from vime.models.disk import disk_place
from vime.models.families import params_of
from vime.recipe.parallel import ParallelLayout
from vime.run.checkpoints import RELEASE, TRACKER

MODELS = {
    "deepseek": tiny_hf.DEEPSEEK,
    "deepseek-fp8": tiny_hf.with_fp8(tiny_hf.DEEPSEEK),
    "moonlight": {
        **{key: value for key, value in tiny_hf.DEEPSEEK.items() if key != "rope_scaling"},
        **{"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2, "num_nextn_predict_layers": 0},
    },
    "qwen3": tiny_hf.QWEN3,
    "qwen3-moe": tiny_hf.QWEN3_MOE,
    "llama": tiny_hf.LLAMA,
}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    yield
    assert not dist.is_initialized()


def convert(hf: Path, save: Path, *flags: str) -> int:
    return tool.main(["--hf-checkpoint", str(hf), "--save", str(save), *flags])


def same_tensors(one: Path, two: Path) -> None:
    a, b = HFCheckpoint(one), HFCheckpoint(two)
    assert a.tensors.keys() == b.tensors.keys()
    for name in a.tensors:
        assert a.info(name).dtype == b.info(name).dtype, name
        assert torch.equal(a.stored(name).view(torch.uint8), b.stored(name).view(torch.uint8)), name


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bit_equal(tmp_path, name):
    hf = tiny_hf.write_checkpoint(tmp_path / "hf", MODELS[name])
    assert convert(hf, tmp_path / "torch_dist") == 0
    assert (tmp_path / "torch_dist" / TRACKER).read_text() == RELEASE
    export(tmp_path / "torch_dist", hf, tmp_path / "back", quantised="fp8" in name, max_shard_bytes=200_000)
    same_tensors(hf, tmp_path / "back")
    assert HFCheckpoint(tmp_path / "back").config == HFCheckpoint(hf).config
    assert (tmp_path / "back" / "tokenizer.json").exists()


def test_fp8_comes_out_as_bf16_unless_asked(tmp_path):
    hf = tiny_hf.write_checkpoint(tmp_path / "hf", MODELS["deepseek-fp8"])
    assert convert(hf, tmp_path / "torch_dist") == 0
    arguments = ["--load", str(tmp_path / "torch_dist"), "--hf-checkpoint", str(hf), "--save", str(tmp_path / "back")]
    assert export_main(arguments) == 0
    original, back = HFCheckpoint(hf), HFCheckpoint(tmp_path / "back")
    assert back.config.quantisation is None
    assert set(back.tensors) == {name for name in original.tensors if not name.endswith("_scale_inv")}
    assert all(torch.equal(original.tensor(name), back.tensor(name)) for name in back.tensors)


def test_scales_that_are_powers_of_two_and_lie_in_another_file(tmp_path):
    """ue8m0, stored in one byte, beside edge blocks in both directions."""
    hf = tiny_hf.with_fp8(tiny_hf.DEEPSEEK, (24, 40))
    stored = tiny_hf.stored_tensors(hf, tiny_hf.random_tensors(hf))
    stored = {n: t.to(torch.float8_e8m0fnu) if n.endswith("_scale_inv") else t for n, t in stored.items()}
    source = tiny_hf.write_folder(tmp_path / "hf", hf, stored, files=4)
    checkpoint = HFCheckpoint(source)
    apart = [n for n in checkpoint.tensors if checkpoint.is_quantised(n)]
    assert any(checkpoint.info(n).file != checkpoint.info(f"{n}_scale_inv").file for n in apart)
    assert convert(source, tmp_path / "torch_dist") == 0
    export(tmp_path / "torch_dist", source, tmp_path / "back")
    back = HFCheckpoint(tmp_path / "back")
    for name in apart:
        wide = stored[f"{name}_scale_inv"].float().repeat_interleave(24, 0).repeat_interleave(40, 1)
        rows, columns = stored[name].shape
        expected = (stored[name].float() * wide[:rows, :columns]).to(torch.bfloat16)
        assert torch.equal(back.stored(name), expected), name


def test_mtp_copies_get_the_current_values(tmp_path):
    """Training changes the embedding; the exported MTP layer, frozen and not in the checkpoint, must follow."""
    hf = tiny_hf.write_checkpoint(tmp_path / "hf", tiny_hf.DEEPSEEK)
    without = {**tiny_hf.DEEPSEEK, "num_nextn_predict_layers": 0}
    trained = tiny_hf.write_checkpoint(tmp_path / "trained", without, seed=1)
    assert convert(trained, tmp_path / "torch_dist") == 0
    export(tmp_path / "torch_dist", hf, tmp_path / "back")
    back, frozen, new = (HFCheckpoint(tmp_path / name) for name in ("back", "hf", "trained"))
    assert torch.equal(back.stored("model.layers.4.embed_tokens.weight"), new.stored("model.embed_tokens.weight"))
    assert torch.equal(back.stored("model.layers.4.shared_head.head.weight"), new.stored("lm_head.weight"))
    assert torch.equal(back.stored("model.layers.4.eh_proj.weight"), frozen.stored("model.layers.4.eh_proj.weight"))
    assert torch.equal(back.stored("model.layers.2.mlp.gate.weight"), new.stored("model.layers.2.mlp.gate.weight"))


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(["deepseek", "qwen3", "qwen3-moe"]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 3]),
)
def test_every_element_is_dealt_to_one_rank(name, tp, pp, ep, etp, extra):
    config = ModelConfig.from_hf(MODELS[name])
    if config.moe is None:
        ep = etp = 1
    ends = {"first_stage_layers": 1} if name != "deepseek" and pp == 2 else {}
    if name != "deepseek" and pp == 4:
        pp = 3
    layout = ParallelLayout(world_size=tp * pp * ep * etp * extra, tp=tp, pp=pp, ep=ep, etp=etp, **ends)
    counts = {param.name: torch.zeros(param.shape, dtype=torch.int) for param in params_of(config)}
    for work in deal_out(config, layout):
        box = tuple(slice(a, a + n) for a, n in zip(work.offset, work.size, strict=True))
        counts[work.param.name][box] += 1
        assert sum(torch.Size(piece.size).numel() for piece in work.pieces) == torch.Size(work.size).numel()
    assert all((count == 1).all() for count in counts.values())


def test_disk_keys_are_megatrons_with_transformer_engine():
    deepseek = {p.name: disk_place(p, c) for c in [ModelConfig.from_hf(tiny_hf.DEEPSEEK)] for p in params_of(c)}
    assert (
        deepseek["decoder.layers.0.pre_mlp_layernorm.weight"].key == "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
    )
    assert deepseek["decoder.layers.1.pre_mlp_layernorm.weight"].key == "decoder.layers.1.pre_mlp_layernorm.weight"
    expert = deepseek["decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"]
    assert (expert.key, expert.index, expert.stack) == (
        "decoder.layers.1.mlp.experts.experts.linear_fc1.weight",
        (3,),
        (8,),
    )
    qwen = {p.name: disk_place(p, c) for c in [ModelConfig.from_hf(tiny_hf.QWEN3)] for p in params_of(c)}
    norm = qwen["decoder.layers.2.input_layernorm.weight"]
    assert (norm.key, norm.index) == ("decoder.layers.self_attention.linear_qkv.layer_norm_weight", (2,))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--num-layer", "4"], "--num-layers"),
        (["--num-layers", "5"], "--num-layers is 5, but config.json implies 4"),
        (["--pipeline-model-parallel-size", "3"], "1 ranks cannot hold"),
        (["--rm-type", "math"], "--rm-type has no meaning"),
        (["--expert-model-parallel-size", "many"], "many"),
    ],
)
def test_wrong_flags_are_named_and_nothing_is_written(tmp_path, capsys, flags, told):
    hf = tiny_hf.write_checkpoint(tmp_path / "hf", tiny_hf.DEEPSEEK)
    assert convert(hf, tmp_path / "save", *flags) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "save").exists()


def test_a_checkpoint_that_is_not_complete_writes_nothing(tmp_path, capsys):
    hf = tiny_hf.write_checkpoint(tmp_path / "hf", tiny_hf.DEEPSEEK)
    file = hf / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert convert(hf, tmp_path / "save") == 2
    assert f"{file} is truncated" in capsys.readouterr().err
    (hf / "config.json").write_text(json.dumps({**tiny_hf.DEEPSEEK, "architectures": ["GPT2LMHeadModel"]}))
    file.unlink()
    assert convert(hf, tmp_path / "save") == 2
    assert not (tmp_path / "save").exists()


def test_a_target_that_holds_a_checkpoint_is_refused(tmp_path, capsys):
    hf = tiny_hf.write_checkpoint(tmp_path / "hf", tiny_hf.QWEN3)
    assert convert(hf, tmp_path / "save") == 0
    other = tiny_hf.write_checkpoint(tmp_path / "other", tiny_hf.QWEN3, seed=1)
    assert convert(other, tmp_path / "save") == 2
    assert f"{tmp_path}/save/release exists and is not made from this source" in capsys.readouterr().err
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / TRACKER).write_text("100")
    assert convert(hf, tmp_path / "trained") == 2
    assert f"{TRACKER} exists" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "trained").iterdir()] == [TRACKER]


def test_what_is_done_is_not_done_again(tmp_path, capsys):
    hf = tiny_hf.write_checkpoint(tmp_path / "hf", tiny_hf.QWEN3)
    assert convert(hf, tmp_path / "save") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "save" / RELEASE).iterdir()}
    # An interruption between the last two renames.
    (tmp_path / "save" / TRACKER).unlink()
    assert convert(hf, tmp_path / "save") == 0
    assert "was complete already" in capsys.readouterr().out
    assert (tmp_path / "save" / TRACKER).read_text() == RELEASE
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "save" / RELEASE).iterdir()} == before


@pytest.mark.parametrize("name", ["deepseek-fp8", "qwen3"])
def test_a_deep_verification_finds_one_changed_bit_anywhere(tmp_path, capsys, name):
    hf = tiny_hf.write_checkpoint(tmp_path / "hf", MODELS[name])
    assert convert(hf, tmp_path / "save") == 0
    assert convert(hf, tmp_path / "save", "--verify") == 0
    file = max((tmp_path / "save" / RELEASE).glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    # Inside a tensor: the middle of an item, which is a zip archive of little more than its data.
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    assert convert(hf, tmp_path / "save", "--verify") == 2
    assert re.search(
        r"release: decoder\..* at \[.*\] is not what the conversion makes of model", capsys.readouterr().err
    )


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(tmp_path, monkeypatch, capsys):
    hf = tiny_hf.write_checkpoint(tmp_path / "hf", tiny_hf.QWEN3)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert convert(hf, tmp_path / "save") == 2
    assert "make room" in capsys.readouterr().err
    assert not (tmp_path / "save").exists()


def test_a_scale_that_is_lost_while_writing_leaves_nothing_complete(tmp_path, monkeypatch, capsys):
    hf = tiny_hf.write_checkpoint(tmp_path / "hf", tiny_hf.QWEN3)
    read, calls = HFCheckpoint.read, []

    def fail_later(self, *arguments):
        calls.append(arguments)
        if len(calls) > 10:
            raise BadInput("the disk went away")
        return read(self, *arguments)

    monkeypatch.setattr(HFCheckpoint, "read", fail_later)
    assert convert(hf, tmp_path / "save") == 2
    assert "the disk went away" in capsys.readouterr().err
    assert not (tmp_path / "save" / TRACKER).exists()
    assert not (tmp_path / "save" / RELEASE).exists()
    monkeypatch.undo()
    assert convert(hf, tmp_path / "save") == 0
    assert [entry.name for entry in (tmp_path / "save").iterdir() if entry.name.startswith(".")] == []


def test_a_torch_dist_of_another_model_is_named(tmp_path):
    small = tiny_hf.write_checkpoint(tmp_path / "small", tiny_hf.QWEN3)
    large = tiny_hf.write_checkpoint(tmp_path / "large", {**tiny_hf.QWEN3, "intermediate_size": 128})
    assert convert(small, tmp_path / "torch_dist") == 0
    with pytest.raises(BadInput, match="linear_fc1"):
        export(tmp_path / "torch_dist", large, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    with pytest.raises(BadInput, match="torch_dist folder"):
        TorchDistReader(tmp_path, ModelConfig.from_hf(tiny_hf.QWEN3))


def test_a_thread_holds_one_tensor_at_a_time(tmp_path):
    made: list[weakref.ref[torch.Tensor]] = []

    def load() -> torch.Tensor:
        assert all(tensor() is None for tensor in made)
        tensor = torch.ones(8, 8)
        made.append(weakref.ref(tensor))
        return tensor

    chunks = [Chunk(f"key{i}", (8, 8), (0, 0), (8, 8), torch.float32, load) for i in range(5)]
    with process_group(Ranks(), tool.TIMEOUT):
        dist_save.save(tmp_path, chunks, {}, {}, made_from={}, cut={})
    assert len(made) == 5


@pytest.mark.e2e
def test_four_ranks_write_what_one_writes(tmp_path):
    hf = tiny_hf.write_checkpoint(tmp_path / "hf", MODELS["deepseek-fp8"])
    layout = ["--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "2"]
    layout += ["--decoder-first-pipeline-num-layers", "1"]
    torchrun(4, str(TOOL), *layout, "--hf-checkpoint", str(hf), "--save", str(tmp_path / "torch_dist"))
    export(tmp_path / "torch_dist", hf, tmp_path / "back", quantised=True)
    same_tensors(hf, tmp_path / "back")


@pytest.mark.e2e
def test_two_tasks_of_a_slurm_step_convert_together(tmp_path):
    """Slurm's variables are set by hand here; the processes and their group are real."""
    hf = tiny_hf.write_checkpoint(tmp_path / "hf", MODELS["deepseek-fp8"])
    layout = ["--pipeline-model-parallel-size", "2", "--decoder-first-pipeline-num-layers", "1"]
    command = [sys.executable, str(TOOL), *layout, "--hf-checkpoint", str(hf), "--save", str(tmp_path / "torch_dist")]
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": str(os.getpid()), "OMP_NUM_THREADS": "1"}
    tasks = [
        subprocess.Popen(command, env={**os.environ, **step, "SLURM_PROCID": str(rank), "MASTER_ADDR": "127.0.0.1"})
        for rank in range(2)
    ]
    try:
        assert [task.wait(timeout=patience.GROUP) for task in tasks] == [0, 0]
    finally:
        for task in tasks:
            task.kill()
    export(tmp_path / "torch_dist", hf, tmp_path / "back", quantised=True)
    same_tensors(hf, tmp_path / "back")

"""The tiny checkpoint: what a download of the real one would bring, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "make_tiny_checkpoint.py"
sys.path.insert(0, str(TOOL.parent))
import make_tiny_checkpoint as tiny  # noqa: E402  # pyright: ignore[reportMissingImports]

from tests.support import patience  # noqa: E402
from vime.fp8 import quantise as fp8  # noqa: E402
from vime.models.config import ModelConfig  # noqa: E402
from vime.models.families import params_of  # noqa: E402


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=patience.GROUP)


@pytest.mark.parametrize("seed", [0, 1])
def test_training_and_held_out_sums_are_disjoint_and_depend_on_the_seed(seed: int) -> None:
    train, held_out = tiny.problems(seed)
    assert not {p.question for p in train} & {p.question for p in held_out}
    assert (len(train), len(held_out)) == (160, 40)
    assert tiny.problems(seed) == (train, held_out)
    assert tiny.problems(seed + 1) != (train, held_out)
    assert all(str(eval(p.question.rstrip("="))) == p.answer for p in train + held_out)


def test_the_tokenizer_gives_the_ids_the_model_was_trained_on(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tiny.save_tokenizer(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    problem = tiny.problems(0)[0][0]
    prompt, answer = problem.ids()
    messages = problem.record()["prompt"]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == prompt
    assert tokenizer.decode(answer, skip_special_tokens=True) == problem.answer
    assert tokenizer.eos_token_id == answer[-1]
    assert len(tokenizer) == tiny.VOCABULARY
    text = "why is (3 + 4) * 2 = 14?\nbecause."
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-math"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    done = run("--output-dir", tmp_path)
    assert done.returncode == 2
    assert "tiny-math exists and was not made by this tool" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


@pytest.mark.e2e
def test_a_model_that_does_not_learn_in_time_leaves_no_checkpoint(tmp_path: Path) -> None:
    done = run("--output-dir", tmp_path, "--family", "qwen3", "--max-steps", "5")
    assert done.returncode != 0
    assert "after 5 steps only" in done.stderr
    assert not (tmp_path / "tiny-qwen3").exists()


@pytest.mark.e2e
@pytest.mark.parametrize("family", ["qwen3", "deepseek-v3"])
def test_the_checkpoint_is_complete_and_answers_about_two_in_five(tmp_path: Path, family: str) -> None:
    done = run("--output-dir", tmp_path, "--family", family, "--seed", "3")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / tiny.NAMES[family]
    made = json.loads((folder / tiny.STAMP).read_text())
    assert 0.2 <= made["accuracy_stored"] <= 0.6

    config = ModelConfig.from_folder(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    shapes: dict[str, list[int]] = {}
    for file in set(index.values()):
        with safe_open(folder / file, "pt") as shard:
            shapes |= {name: shard.get_slice(name).get_shape() for name in shard.keys()}  # noqa: SIM118
    assert set(shapes) == set(index)
    for param in params_of(config):
        for part in param.parts:
            assert shapes[part.name] == list(part.shape)
            quantised = fp8.is_quantised(part.name, part.quantised, config.quantisation)
            assert (fp8.scale_name(part.name) in shapes) == quantised
    before = (folder / "config.json").stat().st_ino
    assert "is there already" in run("--output-dir", tmp_path, "--family", family, "--seed", "3").stdout
    assert (folder / "config.json").stat().st_ino == before

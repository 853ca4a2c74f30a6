"""A `$BASE_DIR` with a tiny checkpoint of random weights, its tokenizer and data, for runs that need not learn."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from tests.support import patience, tiny_hf

ROOT = Path(__file__).parents[2]


def tool() -> ModuleType:
    """tools/make_tiny_checkpoint.py as a module."""
    spec = importlib.util.spec_from_file_location("make_tiny_checkpoint", ROOT / "tools" / "make_tiny_checkpoint.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_qwen3(base: Path) -> None:
    """`tiny-qwen3` in bf16 and `tiny-math`."""
    make = tool()
    config = make.CONFIGS["qwen3"]
    tensors = tiny_hf.random_tensors(config)
    smaller = {name: value * 0.3 if value.dim() == 2 else value for name, value in tensors.items()}
    make.save_tokenizer(tiny_hf.write_folder(base / "tiny-qwen3", config, smaller))
    make.make_data(base, 0)


def write_deepseek(base: Path) -> None:
    """`tiny-deepseek-r1` in block fp8 with its real tokenizer, and two prompts a set."""
    folder = tiny_hf.write_checkpoint(base / "tiny-deepseek-r1", tiny_hf.with_fp8(tiny_hf.DEEPSEEK), files=2)
    tool().save_tokenizer(folder)
    (base / "tiny-math").mkdir()
    rows = [{"prompt": f"{number}+1=", "label": str(number + 1)} for number in range(2)]
    for name in ("train", "eval"):
        (base / "tiny-math" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def start_run(base: Path, name: str, *flags: str, nodes: int = 1, log: Path) -> subprocess.Popen[bytes]:
    """`python -m vime.submit --cluster local --recipe tiny-qwen3`, under way; its output goes to the log."""
    env = {**os.environ, "BASE_DIR": str(base), "XDG_STATE_HOME": str(base / "state")}
    command = [sys.executable, "-m", "vime.submit", "--cluster", "local", "--recipe", "tiny-qwen3"]
    command += ["--nodes", str(nodes), "--run-name", name, "--base-dir", str(base), "--"]
    command += ["--rollout-timeout", str(patience.GROUP), *flags]
    with log.open("wb") as output:
        return subprocess.Popen(command, env=env, cwd=ROOT, stdout=output, stderr=output)

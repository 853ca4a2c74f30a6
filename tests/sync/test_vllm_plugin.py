"""The plugin in vLLM: that it is found, and that the defects it mends are there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.fresh_engine import ENVIRONMENT
from tests.support.small_models import DEEPSEEK, trained, write_folder
from vime.sync.vllm_plugin import BACKENDS, register


def test_vllm_finds_the_plugin() -> None:
    found = {point.name: point.value for point in entry_points(group="vllm.general_plugins")}
    assert found["vime"] == "vime.sync.vllm_plugin:register"


@pytest.mark.e2e
def test_the_backends_are_known_to_vllm_however_often_the_plugin_is_loaded() -> None:
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    register()
    register()
    for name in BACKENDS:
        loaded = WeightTransferEngineFactory._registry[name]()
        assert loaded.__name__ == "TransferEngine"


@pytest.mark.e2e
def test_an_update_keeps_experts_packed_which_vllm_alone_does_not(tmp_path: Path) -> None:
    """Reloading the very weights that an engine has must change nothing; without the mend the experts are garbage."""
    folder = write_folder(tmp_path / "model", DEEPSEEK, trained(DEEPSEEK, 1))
    output = tmp_path / "answers.json"
    command = [sys.executable, "-m", "tests.support.reload_in_place", str(folder), str(output)]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_PLUGINS": ""}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=patience.TRAINING)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(output.read_text())
    assert found["mended"] == found["before"]
    assert found["vllm"] != found["before"], "vLLM packs experts after an update now: drop mend_cpu_experts"

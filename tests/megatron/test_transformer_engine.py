"""Real Transformer Engine on GPUs: grouped experts and dense layers are saved, resumed and resharded.

What Megatron-LM's loader makes of such checkpoints is test_megatron_lm.py's, which takes this spec where it runs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.support import tiny_hf
from tests.support.single import MODELS
from tests.support.worker_cases import Case, Result, run_cases
from vime.checkpoint.allowed import check_training_checkpoint

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"),
]

RECIPE: dict[str, dict[str, Any]] = {
    "model": {"bf16": True},
    "algorithm": {"use_kl_loss": True, "kl_loss_coef": 0.5},
    # Gradients near zero have the sign of their rounding, which Adam's usual epsilon makes whole steps of.
    "optimizer": {"lr": 1e-3, "adam_eps": 1e-3, "weight_decay": 0.1, "clip_grad": 1.0},
}
COMPARED = ("train/loss", "train/kl_loss", "train/train_rollout_logprob_abs_diff", "train/grad_norm")
LAYOUTS: dict[int, dict[str, Any]] = {1: {}, 2: {"world_size": 2, "ep": 2}}


def case(
    name: str, folder: Path, ranks: int, rollouts: list[int], *, load: str = "", save_loaded: bool = False
) -> Case:
    save = folder / name
    checkpoint = {"conversion": "direct", "save": str(save), "load": str(folder / (load or name))}
    hf, recipe = str(folder / "hf"), {**RECIPE, "checkpoint": checkpoint}
    return Case(name, hf, LAYOUTS[ranks], recipe, rollouts=rollouts, save_after=rollouts, save_loaded=save_loaded)


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a training checkpoint, weights and optimizer states, by name."""
    reader = dcp.FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


# A dense model has no experts to spread.
PLACES = [(model, ranks) for ranks in LAYOUTS for model in MODELS if ranks == 1 or model != "qwen3"]


@pytest.fixture(scope="module", params=PLACES, ids=lambda place: f"{place[0]}-on-{place[1]}")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Rollouts 0 and 1 in one go, twice; rollout 0 alone; rollout 1 on it; and rollout 0's state, loaded by one GPU and
    saved again."""
    model, ranks = request.param
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    folder = tmp_path_factory.mktemp(f"{model}{ranks}")
    tiny_hf.write_checkpoint(folder / "hf", MODELS[model])
    cases = [
        case("straight", folder, ranks, [0, 1]),
        case("again", folder, ranks, [0, 1]),
        case("stopped", folder, ranks, [0]),
        case("resumed", folder, ranks, [1], load="stopped"),
        case("on_one", folder, 1, [], load="stopped", save_loaded=True),
    ]
    return run_cases(cases, ranks, folder / "run")


def test_a_resumed_run_goes_on_as_the_straight_one(results: dict[str, Result]) -> None:
    """Nearer than what another run differs by: sums on a GPU have no order, and in bf16 rounding sends tokens to other
    experts."""
    assert [results[case].error for case in ("straight", "again", "stopped", "resumed")] == [""] * 4
    assert results["resumed"].next_rollout_id == 1
    straight, again = results["straight"].metrics, results["again"].metrics
    for metric in COMPARED:
        noise = max(abs(again[rollout][metric] - straight[rollout][metric]) for rollout in (0, 1))
        allowed = max(3 * noise, 1e-2 * abs(straight[1][metric]))
        assert results["resumed"].metrics[0][metric] == pytest.approx(straight[1][metric], abs=allowed, rel=0), metric


def test_another_layout_loads_the_same_numbers(results: dict[str, Result]) -> None:
    """Bit for bit, weights and states of Adam. Losses would not show it: rounding sends tokens to other experts."""
    assert [results[case].error for case in ("stopped", "on_one")] == ["", ""]
    saved, again = (tensors_of(Path(results[case].saved[0])) for case in ("stopped", "on_one"))
    assert saved.keys() == again.keys()
    assert any("exp_avg" in name for name in saved)
    assert [name for name, tensor in saved.items() if not torch.equal(tensor, again[name])] == []


def test_what_it_wrote_is_a_whole_checkpoint(results: dict[str, Result]) -> None:
    for folder in results["straight"].saved:
        check_training_checkpoint(Path(folder))

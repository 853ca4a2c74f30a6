"""A stopped run goes on as if it had not stopped: at the same layout bit for bit, at another one within rounding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny_hf
from tests.support.single import MODELS
from tests.support.worker_cases import Case, Result, run_cases
from vime.checkpoint.export import export
from vime.checkpoint.hf import HFCheckpoint
from vime.megatron.checkpoint_folders import STATE_FILE
from vime.models.config import ModelConfig
from vime.models.families import params_of
from vime.run.checkpoints import TRACKER

pytestmark = pytest.mark.e2e

# A real Adam: what it does depends on the moments that the checkpoint has to bring back.
RECIPE: dict[str, dict[str, Any]] = {
    "optimizer": {"lr": 1e-3, "adam_eps": 1e-8, "weight_decay": 0.1, "lr_decay_style": "linear"},
    "algorithm": {"use_kl_loss": True, "kl_loss_coef": 0.1},
}
PP2_EP2 = {"world_size": 4, "pp": 2, "ep": 2}
TP2 = {"world_size": 2, "tp": 2, "ep": 2, "sequence_parallel": True}


def case(name: str, checkpoint: str, save: Path, layout: dict[str, Any], rollouts: list[int], **changes: Any) -> Case:
    more = changes.pop("checkpoint_options", {})
    recipe = {**RECIPE, "checkpoint": {"conversion": "direct", "save": str(save), "load": str(save), **more}}
    for group, values in changes.pop("recipe", {}).items():
        recipe[group] = {**recipe.get(group, {}), **values}
    return Case(name, checkpoint, layout, recipe, rollouts=rollouts, save_after=rollouts, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Result]:
    """Rollouts 0 and 1 in one go at three layouts; then a new start for 1 on what was saved after 0."""
    checkpoint = str(tiny_hf.write_checkpoint(folder / "hf", MODELS["deepseek"]))
    bf16 = {"recipe": {"model": {"bf16": True}}}
    again = {"recipe": {"checkpoint": {"load": str(folder / "pp_first")}}}
    cases = [
        case("straight", checkpoint, folder / "straight", {}, [0, 1]),
        case("again", checkpoint, folder / "again", {}, [0, 1]),
        case("first", checkpoint, folder / "stopped", {}, [0]),
        case("second", checkpoint, folder / "stopped", {}, [1]),
        case("pp_straight", checkpoint, folder / "pp_straight", PP2_EP2, [0, 1]),
        case("pp_first", checkpoint, folder / "pp_first", PP2_EP2, [0], checkpoint_options={"async_save": True}),
        case("pp_second", checkpoint, folder / "pp_second", PP2_EP2, [1], **again),
        case("tp_second", checkpoint, folder / "tp_second", TP2, [1], **again),
        case("one_second", checkpoint, folder / "one_second", {}, [1], **again),
        case("bf16_straight", checkpoint, folder / "bf16_straight", TP2, [0, 1], **bf16),
        case("bf16_first", checkpoint, folder / "bf16", TP2, [0], **bf16),
        case("bf16_second", checkpoint, folder / "bf16", TP2, [1], **bf16),
    ]
    return run_cases(cases, 4, folder / "run")


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


def test_the_same_seed_and_layout_give_the_same_numbers_bit_for_bit(results: dict[str, Result]) -> None:
    for one, two in zip(results["straight"].metrics, results["again"].metrics, strict=True):
        assert without_times(one) == without_times(two)


@pytest.mark.parametrize(
    ("second", "straight", "relative"),
    [
        ("second", "straight", 0.0),
        ("pp_second", "pp_straight", 0.0),
        ("tp_second", "straight", 1e-3),
        ("one_second", "straight", 1e-3),
        ("bf16_second", "bf16_straight", 0.0),
    ],
)
def test_a_resumed_run_goes_on_as_the_straight_one(
    results: dict[str, Result], second: str, straight: str, relative: float
) -> None:
    resumed = results[second]
    assert resumed.error == ""
    assert resumed.next_rollout_id == 1
    assert resumed.extra == {"cursor": 0}
    expected = without_times(results[straight].metrics[1])
    for name, value in without_times(resumed.metrics[0]).items():
        assert value == pytest.approx(expected[name], rel=relative, abs=relative * 1e-2), name


def test_the_start_is_the_hf_checkpoint_and_rollout_0_without_a_tracker(results: dict[str, Result]) -> None:
    first = results["first"]
    assert (first.next_rollout_id, first.extra) == (0, {})
    assert first.loaded_from.endswith("hf")


def test_a_saved_checkpoint_exports_to_hf_with_the_frozen_mtp_layer(folder: Path, results: dict[str, Result]) -> None:
    original = HFCheckpoint(folder / "hf")
    export(results["straight"].saved[-1], folder / "hf", folder / "exported")
    exported = HFCheckpoint(folder / "exported")
    changed = 0
    for param in params_of(ModelConfig.from_hf(MODELS["deepseek"])):
        for part in param.parts:
            equal = bool((exported.tensor(part.name) == original.tensor(part.name)).all())
            changed += not equal
            assert equal or not param.name.startswith("mtp.")
    assert changed > 20


def test_what_is_written_names_the_files_and_the_layout(results: dict[str, Result]) -> None:
    saved = Path(results["pp_first"].saved[0])
    content = json.loads((saved / STATE_FILE).read_text())
    assert content["layout"]["pp"] == 2
    assert {".metadata", "common.pt", "metadata.json"} <= set(content["files"])


@pytest.fixture(scope="module")
def faults(folder: Path, results: dict[str, Result]) -> tuple[Result, dict[str, Result]]:
    """A trainer killed while it saves in the background, and new starts: on what it left, and on damaged copies."""
    checkpoint = str(folder / "hf")
    in_background = {"checkpoint_options": {"async_save": True, "save_keep": 1}}
    killed = case("killed", checkpoint, folder / "killed", {}, [0, 1], die_in_last_save=True, **in_background)
    (last,) = run_cases([killed], 1, folder / "killed_run").values()
    cases = [case("after_kill", checkpoint, folder / "killed", {}, [1, 2], **in_background)]
    for harm in (cut, flip_a_byte):
        copy = folder / harm.__name__
        shutil.copytree(folder / "straight", copy)
        harm(copy / "iter_0000001")
        cases.append(case(harm.__name__, checkpoint, copy, {}, [1]))
    return last, run_cases(cases, 1, folder / "faults_run")


def test_a_trainer_killed_while_it_saves_goes_on_from_the_checkpoint_before(
    folder: Path, results: dict[str, Result], faults: tuple[Result, dict[str, Result]]
) -> None:
    killed, after = faults[0], faults[1]["after_kill"]
    assert killed.left == [".iter_0000001.partial", "iter_0000000", TRACKER]
    assert (after.next_rollout_id, after.extra) == (1, {"cursor": 0})
    assert without_times(after.metrics[0]) == without_times(results["straight"].metrics[1])
    assert sorted(path.name for path in (folder / "killed").iterdir()) == ["iter_0000002", TRACKER]


@pytest.mark.parametrize(("harm", "said"), [("cut", "bytes"), ("flip_a_byte", "does not hold what was written")])
def test_the_checkpoint_before_a_damaged_one_is_taken_with_a_warning(
    folder: Path, results: dict[str, Result], faults: tuple[Result, dict[str, Result]], harm: str, said: str
) -> None:
    found = faults[1][harm]
    assert found.next_rollout_id == 1
    assert found.loaded_from.endswith("iter_0000000")
    (warning,) = [line for line in found.printed.splitlines() if f"{harm}/iter_0000001 cannot be used" in line]
    assert said in warning
    assert without_times(found.metrics[0]) == without_times(results["straight"].metrics[1])


def cut(checkpoint: Path) -> None:
    shard = sorted(checkpoint.glob("*.distcp"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])


def flip_a_byte(checkpoint: Path) -> None:
    shard = sorted(checkpoint.glob("*.distcp"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 16
    shard.write_bytes(content)

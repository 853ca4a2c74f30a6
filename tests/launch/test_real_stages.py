"""A real conversion as a stage of runs: made, taken over after an interruption, skipped, verified deeply."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support import tiny_hf
from tests.support.launch_stub import make_plan, preflight
from vime.errors import Cause
from vime.launch.controller import Controller
from vime.planning.build import make_plan as plan_recipe
from vime.planning.cluster import load_cluster
from vime.recipe.load import load_recipe
from vime.run.journal import Event, last_start, read_events
from vime.run.plan import Stage
from vime.schedulers.runner_local import LocalRunner
from vime.system import fingerprint

pytestmark = pytest.mark.e2e


@pytest.fixture
def stages(tmp_path: Path) -> list[Stage]:
    """Conversion and its deep verification, of the tiny recipe, for a checkpoint with real weights."""
    base = tmp_path / "base"
    hf = {**tiny_hf.with_fp8(tiny_hf.DEEPSEEK, (128, 128)), "hidden_size": 256, "moe_intermediate_size": 384}
    tiny_hf.write_checkpoint(base / "tiny-deepseek-r1", hf, files=2)
    (base / "tiny-math").mkdir()
    for name in ("train", "eval"):
        (base / "tiny-math" / f"{name}.jsonl").write_text('{"prompt": "1+1=", "label": "2"}\n')
    recipe = load_recipe("tiny-deepseek-r1", ["--conversion", "one-pass"])
    plan = plan_recipe(recipe, cluster=load_cluster("local"), base_dir=base, verify_deep=True)
    return [stage for stage in plan.stages if "convert" in stage.name]


def run(run_dir: Path, stages: list[Stage]) -> tuple[Cause, list[Event]]:
    plan = make_plan(run_dir, [preflight(run_dir, 1), *stages])
    cause = Controller(plan, LocalRunner(plan), say=lambda line: None).run()
    return cause, last_start(read_events(run_dir))


def kinds(events: list[Event]) -> dict[str, str]:
    ends = [event for event in events if event.kind in ("stage-skip", "stage-end") and event.text != "stopped"]
    return {event.stage or "": event.kind for event in ends if event.stage != "preflight"}


def test_a_conversion_is_made_once_and_verified_by_reading_all(
    tmp_path: Path, stages: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files of a few megabytes would be read whole, unlike those of a real checkpoint.
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 2**20)
    cause, events = run(tmp_path / "first", stages)
    assert cause is Cause.SUCCESS, events[-1]
    assert kinds(events) == {"convert": "stage-end", "verify-convert": "stage-end"}

    # The controller died between the end of the stage and its manifest.
    output = Path(stages[0].outputs[0].path)
    manifest = json.loads((output / ".vime-artefact.json").read_text())
    claim = {key: manifest[key] for key in ("fingerprint", "inputs")}
    output.with_name(f".{output.name}.vime-stage.json").write_text(json.dumps(claim))
    (output / ".vime-artefact.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in (output / "release").iterdir()}
    cause, events = run(tmp_path / "second", stages[:1])
    assert (cause, kinds(events)) == (Cause.SUCCESS, {"convert": "stage-end"})
    assert {path: path.stat().st_mtime_ns for path in (output / "release").iterdir()} == before

    # A bit that no sample sees, under the old time: only reading all of it finds it.
    shard = max(Path(stages[0].inputs[0].path).glob("*.safetensors"), key=lambda path: path.stat().st_size)
    status = shard.stat()
    with shard.open("r+b") as file:
        file.seek(status.st_size // 2 + status.st_size // 11)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    cause, events = run(tmp_path / "third", stages)
    assert cause is Cause.BAD_INPUT
    assert kinds(events) == {"convert": "stage-skip"}
    assert "is not what the conversion makes of model." in events[-1].text

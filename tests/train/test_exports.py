"""HF folders are written from checkpoints by a process beside training, which neither waits nor loses its source."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from tests.support import patience, tiny_hf
from tests.support.plans import plan_of
from vime.checkpoint.convert import main as convert
from vime.checkpoint.hf import HFCheckpoint
from vime.megatron.checkpoint_folders import State, fresh_partial, publish
from vime.run.checkpoints import held, hold, iterations
from vime.train import exports
from vime.train.exports import ExportFailed, Exports


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny checkpoint, and its torch_dist form."""
    base = tmp_path_factory.mktemp("base")
    config = {**tiny_hf.QWEN3, "num_hidden_layers": 1}
    tiny_hf.write_folder(base / "tiny-qwen3", config, tiny_hf.random_tensors(config))
    assert convert(["--hf-checkpoint", str(base / "tiny-qwen3"), "--save", str(base / "dist")]) == 0
    return base


@pytest.fixture
def run(base, tmp_path, monkeypatch):
    """Makes the exports of a run, whose reports to the controller are kept in a list."""
    told = []
    monkeypatch.setattr(exports, "report", lambda kind, **data: told.append((kind, data)))

    def make(*flags):
        words = ("--save-interval", "1", "--num-rollout", "9", *flags)
        plan = plan_of("tiny-qwen3", *words, nodes=1, base=base, run_dir=tmp_path / "run")
        return Exports(plan, deadline_s=patience.GROUP), tmp_path / "run", told

    return make


def save(base, run, number):
    shutil.copytree(base / "dist" / "release", run / "checkpoints" / f"iter_{number:07d}")


async def finished(it):
    working = asyncio.create_task(it.run())
    try:
        await asyncio.wait_for(it.finish(), patience.GROUP)
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def test_a_checkpoint_becomes_an_hf_folder_and_a_job_is_asked_for(base, run):
    it, folder, told = run("--eval-job")
    save(base, folder, 0)
    it.saved(0)
    assert held(folder / "checkpoints") == {0}
    await finished(it)
    weights = folder / "evaluations" / "0000000" / "weights"
    ours, source = HFCheckpoint(weights), HFCheckpoint(base / "tiny-qwen3")
    name = "model.layers.0.mlp.down_proj.weight"
    assert (ours.tensor(name) == source.tensor(name)).all()
    assert told == [("evaluate", {"rollout_id": 0, "weights": str(weights)})]
    assert held(folder / "checkpoints") == set()


async def test_a_failed_export_of_save_hf_is_told_at_once_and_fails_the_run_at_its_end(base, run, tmp_path, capsys):
    it, folder, told = run("--eval-job", "--save-hf", str(tmp_path / "hf-{rollout_id}"))
    save(base, folder, 0)
    (tmp_path / "hf-0").mkdir()
    (tmp_path / "hf-0" / "mine").touch()
    it.saved(0)
    with pytest.raises(ExportFailed, match=r"--save-hf: no HF folder was written for rollout 0: .*is not empty"):
        await finished(it)
    assert "error: rollout 0: no HF folder was written: error: " in capsys.readouterr().out
    assert told[0][1].keys() == {"rollout_id", "left_out"}


async def test_exports_for_evaluations_alone_do_not_pile_up(run):
    it, folder, told = run("--eval-job")
    (folder / "checkpoints").mkdir(parents=True)
    for number in range(4):
        it.saved(number)
    assert held(folder / "checkpoints") == {0, 1}
    assert [data["rollout_id"] for _, data in told] == [2, 3]


async def test_a_start_ends_what_the_one_before_left(base, run):
    it, folder, _ = run("--eval-job")
    save(base, folder, 3)
    hold(folder / "checkpoints", 3)
    it, _, told = run("--eval-job")
    assert held(folder / "checkpoints") == set()
    it.resume(3)
    await finished(it)
    assert [data["rollout_id"] for _, data in told] == [3]
    it.resume(3)
    assert held(folder / "checkpoints") == set()


def test_a_checkpoint_in_use_is_removed_only_afterwards(tmp_path):
    def saved(number):
        fresh_partial(tmp_path, number)
        publish(tmp_path, State(number, 0, {}), keep=1, layout={})

    saved(0)
    hold(tmp_path, 0)
    saved(1)
    saved(2)
    assert iterations(tmp_path) == [2, 0]
    (tmp_path / "in_use_0000000").unlink()
    saved(3)
    assert iterations(tmp_path) == [3]

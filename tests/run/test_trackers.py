"""Trackers get what the run's own file gets. Their libraries are real; W&B's keeps what it would send its service."""

import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.plans import plan_of
from vime.errors import BadInput
from vime.recipe.load import load_recipe
from vime.run.metrics import MetricsWriter
from vime.run.trackers import mlflow_name, trackers_of

WANDB_WRITER = """
import sys
from vime.recipe.load import load_recipe
from vime.run.metrics import MetricsWriter
from vime.run.trackers import trackers_of
flags = "--use-wandb --wandb-project p --wandb-entity team --wandb-group g --wandb-name n --wandb-tags a b"
more = "--wandb-mode offline --env HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz --lr 0.5"
recipe = load_recipe("tiny-qwen3", [*flags.split(), *more.split()])
for step in (3, 4):
    writer = MetricsWriter(sys.argv[1], trackers_of(recipe, "r:1", sys.argv[1]))
    writer.write(step, {"train/loss": 1 / step, "train/kl_loss": float("nan")})
    if step == 4:
        writer.write(1, {"eval/aime": 0.5})
        writer.write(2, {"eval/aime": 0.6})
        writer.write(4, {"train/lr": 0.5})
    writer.close()
"""


def test_metrics_reach_weights_and_biases_by_flag(tmp_path, monkeypatch):
    """Its library is real, but not its service: the library keeps what it would send. A run goes on on its page."""
    env = {**os.environ, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WANDB_WRITER, str(tmp_path)], env=env, capture_output=True, timeout=patience.PROCESS
    )
    assert done.returncode == 0, done.stderr
    # Its import makes temporary folders, which may stay.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, second = (list(wandb_records(path)) for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")))
    for records, step in ((first, 3), (second, 4)):
        (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
        assert (run.project, run.entity, run.run_group, run.display_name) == ("p", "team", "g", "n")
        assert (run.run_id, list(run.tags)) == ("r-1", ["a", "b"])
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["optimizer"]["lr"] == 0.5
        assert "hf_abc" not in json.dumps(config)
        found = [record.history for record in records if record.WhichOneof("record_type") == "history"]
        rows = [{item.nested_key[0]: json.loads(item.value_json) for item in each.item} for each in found]
        assert rows[0]["_step"] == step
        assert rows[0]["train/loss"] == 1 / step
        assert not any("train/kl_loss" in row for row in rows)
        # Two evaluations beside the run bring values of earlier steps, and rollout 4 goes on.
        late = [(row["eval/rollout"], row["eval/aime"]) for row in rows if "eval/aime" in row]
        assert late == ([(1, 0.5), (2, 0.6)] if step == 4 else [])
        assert rows[0].get("train/lr") == (0.5 if step == 4 else None)


def wandb_records(path: Path):
    """The records of a run's file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    data, at, record, block = path.read_bytes(), 7, b"", 2**15
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


@pytest.mark.parametrize("library", ["wandb", "mlflow"])
def test_without_its_library_the_flag_is_refused_by_name(tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    recipe = load_recipe("tiny-qwen3", [f"--use-{library}"])
    with pytest.raises(BadInput, match=f"--use-{library}: {library} is not installed"):
        trackers_of(recipe, "r", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_metrics_reach_mlflow_and_a_resumed_run_goes_on_in_its_own(tmp_path):
    from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

    flags = ["--use-mlflow", "--lr", "0.5", "--env", "HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz"]
    recipe = load_recipe("tiny-qwen3", flags)
    for step in (3, 4):
        writer = MetricsWriter(tmp_path, trackers_of(recipe, "r:1", tmp_path))
        writer.write(step, {"train/loss": 1 / step, "eval/aime/pass@8": 0.5, "train/kl_loss": float("nan")})
        writer.close()
    client = MlflowClient((tmp_path / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("vime")
    (run,) = client.search_runs([experiment.experiment_id])
    assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/loss")] == [
        (3, 1 / 3),
        (4, 1 / 4),
    ]
    assert run.data.metrics["eval/aime/pass_at_8"] == 0.5
    assert run.data.params["optimizer.lr"] == "0.5"
    assert "hf_abc" not in json.dumps(run.data.params)
    assert (run.info.run_name, run.info.status) == ("r:1", "FINISHED")


def test_names_are_written_in_mlflows_characters():
    assert mlflow_name("eval/tiny-math/pass@16") == "eval/tiny-math/pass_at_16"


def test_a_password_in_the_address_is_refused():
    with pytest.raises(BadInput, match="--mlflow-tracking-uri holds a password"):
        plan_of("tiny-qwen3", "--mlflow-tracking-uri", "https://me:secret@server/", nodes=1)

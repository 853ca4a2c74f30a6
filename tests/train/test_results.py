"""The driver takes each result once; an evaluation whose run has ended delivers its own."""

from __future__ import annotations

import json

from tests.support.evaluated import ended, evaluated
from tests.support.launch_stub import make_plan, stub
from vime.run.evaluations import evaluation_folder, is_taken, read_result
from vime.run.journal import Journal
from vime.run.metrics import MetricsWriter
from vime.run.owner import OWNER
from vime.train import results
from vime.train.results import Results, deliver


def lines(run) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def test_the_driver_takes_a_result_once_and_removes_the_weights(tmp_path, capsys):
    folder = evaluated(tmp_path, 4, 0.5)
    (folder / "weights").mkdir()
    metrics = MetricsWriter(tmp_path)
    metrics.write(9, {"train/loss": 1.0})
    for start in (Results(str(tmp_path), metrics), Results(str(tmp_path), metrics)):
        await start.take()
        await start.take()
    metrics.close()
    assert [(line["step"], line.get("eval/aime")) for line in lines(tmp_path)] == [(9, None), (4, 0.5)]
    assert is_taken(folder)
    assert not (folder / "weights").exists()
    assert capsys.readouterr().out == "eval 4: eval/aime 0.5\n"


async def test_an_evaluation_that_is_repeated_by_hand_is_taken_again(tmp_path):
    metrics = MetricsWriter(tmp_path)
    taking = Results(str(tmp_path), metrics)
    ended(evaluation_folder(tmp_path, 4), cause="CRASH")
    await taking.take()
    for value in (0.5, 0.6):
        evaluated(tmp_path, 4, value)
        await taking.take()
    metrics.close()
    assert [line["eval/aime"] for line in lines(tmp_path)] == [0.5, 0.6]


async def test_an_evaluation_that_failed_is_left_out_and_said_once(tmp_path, capsys):
    folder = ended(evaluation_folder(tmp_path, 4), cause="CRASH")
    (folder / "weights").mkdir()
    metrics = MetricsWriter(tmp_path)
    taking = Results(str(tmp_path), metrics)
    await taking.take()
    await taking.take()
    metrics.close()
    assert capsys.readouterr().out == "eval 4 is left out: CRASH: an engine died\n"
    assert lines(tmp_path) == []
    assert not (folder / "weights").exists()


def result_of(folder):
    found = read_result(folder)
    assert found is not None
    return found


def test_after_the_run_an_evaluation_writes_its_own_point(tmp_path):
    make_plan(tmp_path, [stub("train", "")])
    folder = evaluated(tmp_path, 4, 0.5)
    deliver(folder, str(tmp_path), result_of(folder))
    assert [(line["step"], line["eval/aime"]) for line in lines(tmp_path)] == [(4, 0.5)]
    assert list((tmp_path / "tensorboard").iterdir())
    assert is_taken(folder)


def test_while_the_run_has_a_driver_an_evaluation_leaves_the_file_to_it(tmp_path, monkeypatch):
    make_plan(tmp_path, [stub("train", "")])
    folder = evaluated(tmp_path, 4, 0.5)
    record = {"job": "1", "restart": 0, "host": "h", "boot": "b", "pid": 1, "pid_start": 1}
    (tmp_path / OWNER).write_text(json.dumps(record))
    monkeypatch.setattr(results, "DELIVERY_SECONDS", 0.0)
    deliver(folder, str(tmp_path), result_of(folder))
    assert lines(tmp_path) == []
    assert not is_taken(folder)
    journal = Journal(tmp_path)
    journal.write("run-start", "")
    journal.write("stage-end", "done", stage="train")
    journal.close()
    deliver(folder, str(tmp_path), result_of(folder))
    assert len(lines(tmp_path)) == 1

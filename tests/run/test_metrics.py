"""Metrics and timelines read back what was written, whatever stopped the writer."""

import errno
import json
from collections import Counter

import pytest

from vime.observe.throughput import tokens_per_gpu
from vime.observe.timeline import Span, Timeline, chrome_trace, read_timeline, waits
from vime.planning.build import make_plan
from vime.planning.cluster import load_cluster
from vime.recipe.load import load_recipe
from vime.run.metrics import MetricsWriter, read_metrics, series
from vime.run.trackers import TensorBoard
from vime.samples import Group, Rollout, Sample
from vime.system.json_lines import LineFile


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path):
    for values in ({0: 0.1, 1: 0.2, 2: 0.3}, {2: 0.9, 3: 1.0}):
        writer = MetricsWriter(tmp_path)
        for step, reward in values.items():
            writer.write(step, {"rollout/raw_reward": reward})
        writer.close()
    steps = read_metrics(tmp_path)
    assert series(steps, "rollout/raw_reward") == [(0, 0.1), (1, 0.2), (2, 0.9), (3, 1.0)]


def test_a_torn_last_line_is_not_read(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(0, {"a": 1.0})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "a": 2')
    assert list(read_metrics(tmp_path)) == [0]


def test_damage_costs_its_lines_only_and_is_counted(tmp_path):
    good = '{"step":0,"time":1.0,"perf/save_time":3.0}\n'
    torn = '{"step":1,"time":2.0,"per{"step":2,"time":3.0,"a":3.0}\n'
    others = "\x00" * 100 + '\n[1]\n{"step":"x"}\n{"step":4,"a":"text"}\n{"step":1e999}\n'
    (tmp_path / "metrics.jsonl").write_text(good + torn + others + '{"step":3,"a":1.0}\n{"step":5,"a"')
    damage = Counter()
    assert read_metrics(tmp_path, damage) == {0: {"time": 1.0, "perf/save_time": 3.0}, 3: {"a": 1.0}}
    assert damage == {"metrics.jsonl": 6}
    writer = MetricsWriter(tmp_path)
    writer.write(6, {"a": 2.0})
    writer.close()
    assert read_metrics(tmp_path)[6]["a"] == 2.0


def test_a_run_that_was_set_back_counts_the_branch_that_lives(tmp_path):
    for first, last in ((0, 5), (3, 4)):
        writer = MetricsWriter(tmp_path)
        writer.start(first)
        assert max(read_metrics(tmp_path), default=-1) == first - 1
        for step in range(first, last):
            writer.write(step, {"rollout/raw_reward": step + first / 10})
        writer.close()
    assert series(read_metrics(tmp_path), "rollout/raw_reward") == [(0, 0), (1, 1), (2, 2), (3, 3.3)]


def test_a_full_disk_loses_values_and_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    writer = MetricsWriter(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LineFile, "append", full)
    for step in range(3):
        writer.write(step, {"a": 1.0})
    monkeypatch.undo()
    writer.write(3, {"a": 1.0})
    writer.close()
    assert list(read_metrics(tmp_path)) == [3]
    assert capsys.readouterr().out.count("metrics.jsonl takes no metrics, values are lost") == 1


def test_a_board_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    board = TensorBoard(tmp_path)
    writer = MetricsWriter(tmp_path, [board])

    def fails(*_):
        raise RuntimeError("its thread died")

    monkeypatch.setattr(board._board, "add_scalar", fails)
    writer.write(0, {"a": 1.0})
    writer.write(1, {"a": 1.0})
    writer.close()
    assert list(read_metrics(tmp_path)) == [0, 1]
    assert capsys.readouterr().out.count("TensorBoard takes no metrics") == 1


def test_a_damaged_timeline_keeps_its_other_spans(tmp_path):
    timeline = Timeline(tmp_path)
    timeline.add(Span("train", 0, "driver", 1.0, 2.0))
    timeline.close()
    with open(tmp_path / "timeline.jsonl", "a") as file:
        file.write('{"name":"x"}\n{"rollout_id":1,"ranks":[[["a",1]]]}\n\x00\x00\n{"rollout_id":9e999}\n{"torn"')
    timeline = Timeline(tmp_path)
    timeline.add(Span("train", 1, "driver", 3.0, 4.0))
    timeline.close()
    damage = Counter()
    assert [span.rollout_id for span in read_timeline(tmp_path, rank_rollouts=5, damage=damage)] == [0, 1]
    assert damage == {"timeline.jsonl": 5}


def test_values_that_are_not_finite_are_null_and_valid_json(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(0, {"train/loss": float("nan"), "train/lr": 1.0})
    writer.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["train/loss"] is None
    assert "train/loss" not in read_metrics(tmp_path)[0]


def test_metrics_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, [TensorBoard(tmp_path)])
    writer.write(3, {"train/loss": 0.5})
    writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Tags()["tensors"] == ["train/loss"]


def test_a_phase_is_recorded_even_when_it_fails(tmp_path):
    timeline = Timeline(tmp_path)
    with pytest.raises(RuntimeError), timeline.phase("generate", 4):
        raise RuntimeError
    assert set(timeline.take_metrics()) == {"perf/generate_time"}
    timeline.close()
    assert [(span.name, span.rollout_id) for span in read_timeline(tmp_path)] == [("generate", 4)]


def test_the_perfetto_trace_has_a_thread_a_track_and_times_from_its_start():
    spans = [Span("train", 0, "rank 0", 10.0, 11.5), Span("train", 0, "rank 1", 10.5, 11.0)]
    events = chrome_trace(spans)["traceEvents"]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["rank 0", "rank 1"]
    assert [(e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"] == [(0, 0, 1500000), (1, 500000, 500000)]


def test_spans_of_ranks_come_back_with_their_tracks_and_only_the_newest_when_asked(tmp_path):
    timeline = Timeline(tmp_path)
    for rollout_id in range(3):
        with timeline.phase("train", rollout_id):
            pass
        timeline.add_ranks(rollout_id, [[("train", 10.0, 14.0), ("wait", 13.0, 14.0)], [("train", 10.0, 14.0)]])
    timeline.close()
    spans = read_timeline(tmp_path)
    assert [span.track for span in spans[:4]] == ["driver", "rank 0", "rank 0", "rank 1"]
    newest = [span for span in read_timeline(tmp_path, rank_rollouts=1) if span.track != "driver"]
    assert {span.rollout_id for span in newest} == {2}
    assert waits(spans) == {"rank 0": 0.25, "rank 1": 0.0}


def test_throughput_counts_shared_gpus_once(base_dir):
    plan = make_plan(
        load_recipe("tiny-deepseek-r1"), cluster=load_cluster("local"), base_dir=base_dir, nodes=2, run_name="x"
    )
    group = Group(0, [Sample(0, 0, "", [1] * 10, response_ids=[2] * 30)])
    assert tokens_per_gpu(plan, Rollout(0, [group], {}), 4.0) == {"perf/tokens_per_gpu_per_s": 40 / 4 / 2}
    assert tokens_per_gpu(plan, Rollout(0, [group], {}), 0.0) == {}

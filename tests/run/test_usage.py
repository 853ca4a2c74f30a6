"""The use of nodes and engines: written whole, private, and taken for the present only while it is fresh."""

import time

from vime.node.usage import UsageWriter, parse_gpus, sample
from vime.run.usage import NodeUsage, read_queues, read_usage, write_queues, write_usage

SMI = """0, 97, 61234, 81559, 66
1, [N/A], 12, 81559, [N/A]
"""


def test_nvidia_smis_answer_is_read_and_what_it_does_not_know_is_none():
    first, second = parse_gpus(SMI)
    assert (first.index, first.percent, first.memory_used, first.celsius) == (0, 97.0, 61234 * 2**20, 66.0)
    assert (second.percent, second.celsius) == (None, None)
    assert parse_gpus("No devices were found\n") == ()


def test_this_host_has_memory_and_a_load():
    found = sample(3)
    assert found.node == 3
    assert 0 < found.memory_used < found.memory_total
    assert found.load >= 0
    assert found.cores >= 1


def test_what_a_node_wrote_is_read_back_and_private(tmp_path):
    usage = NodeUsage(11, time.time(), 1.0, 2, 3.0, 4.0, parse_gpus(SMI))
    write_usage(tmp_path, usage)
    write_usage(tmp_path, NodeUsage(2, 0.0, 1.0, 2, 3.0, 4.0))
    assert read_usage(tmp_path)[1] == usage
    assert [(found.node, found.fresh) for found in read_usage(tmp_path)] == [(2, False), (11, True)]
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "usage").iterdir()} == {0o600}


def test_queues_of_long_ago_say_nothing(tmp_path, monkeypatch):
    assert read_queues(tmp_path) == []
    write_queues(tmp_path, [[1, 2], [3]])
    assert read_queues(tmp_path) == [[1, 2], [3]]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 300)
    assert read_queues(tmp_path) == []


def test_a_folder_that_cannot_be_written_ends_the_writer_with_a_line(tmp_path, capsys):
    writer = UsageWriter(str(tmp_path / "file" / "run"), 0)
    (tmp_path / "file").write_text("")
    writer.run()
    assert "no longer written" in capsys.readouterr().err

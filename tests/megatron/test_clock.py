"""A rank's clock: spans in order, seconds by name, and the wait before the first collective of a step."""

from __future__ import annotations

import time

import pytest

from tests.support.single import one_process
from vime.megatron.spans import SpanRecorder


def test_spans_are_taken_once_and_seconds_add_up() -> None:
    clock = SpanRecorder()
    for _ in range(2):
        with clock.span("train"):
            time.sleep(0.01)
    assert clock.seconds()["train"] >= 0.02
    spans = clock.take_spans()
    assert [name for name, _, _ in spans] == ["train", "train"]
    assert spans[0][2] <= spans[1][1]
    assert clock.take_spans() == []


def test_a_block_that_fails_leaves_no_span() -> None:
    clock = SpanRecorder()
    with pytest.raises(RuntimeError), clock.span("train"):
        raise RuntimeError
    assert clock.take_spans() == []


def test_the_wait_lies_before_the_call_which_gets_its_arguments() -> None:
    clock, calls = SpanRecorder(), []
    with one_process(), clock.span("train"):
        clock.after_all_ranks(lambda *args, **kwargs: calls.append((args, kwargs)))(1, two=2)
    assert calls == [((1,), {"two": 2})]
    (wait, start, end), (train, begin, last) = clock.take_spans()
    assert (wait, train) == ("wait", "train")
    assert begin <= start <= end <= last

"""A node that is slower than others with the same work is named, once it has been for ten rollouts."""

from __future__ import annotations

import pytest

from vime.observe.stragglers import Straggler, straggler
from vime.observe.timeline import Span
from vime.observe.verdict import health

NODES, STAGES = (0, 0, 1, 1, 2, 2, 3, 3), (0, 0, 0, 0, 1, 1, 1, 1)


def spans(rollout: int, **slow: float) -> list[Span]:
    """Ranks of two stages, of which the second has twice the work, on four nodes; `r3=2.0`: rank 3 takes twice as long.

    All wait for the slowest at the barrier inside `train`.
    """
    busy = [(1 + stage) * slow.get(f"r{rank}", 1.0) for rank, stage in enumerate(STAGES)]
    found = []
    for rank, seconds in enumerate(busy):
        track = f"rank {rank}"
        found += [
            Span("log_probs", rollout, track, 0.0, 1.0),
            Span("train", rollout, track, 1.0, 1.0 + max(busy)),
            Span("wait", rollout, track, 1.0 + seconds, 1.0 + max(busy)),
        ]
    return found


def run(*rollouts: list[Span]) -> list[Span]:
    return [span for each in rollouts for span in each]


def test_the_slow_node_is_named_with_its_phase() -> None:
    found = straggler(run(*(spans(n, r3=2.0) for n in range(10))), NODES, STAGES)
    assert found == Straggler(node=1, ratio=pytest.approx(1.5), phase="train")


def test_a_stage_with_more_work_is_not_slow() -> None:
    assert straggler(run(*(spans(n) for n in range(12))), NODES, STAGES) is None


def test_nine_rollouts_are_too_few() -> None:
    assert straggler(run(*(spans(n, r3=2.0) for n in range(9))), NODES, STAGES) is None


def test_one_good_rollout_of_the_last_ten_clears_a_node() -> None:
    rollouts = [spans(n, r3=2.0) for n in range(20)]
    rollouts[15] = spans(15)
    assert straggler(run(*rollouts), NODES, STAGES) is None


def test_a_fifth_more_is_not_yet_slow() -> None:
    """1.15 of the training time is less of the whole."""
    assert straggler(run(*(spans(n, r3=1.15) for n in range(10))), NODES, STAGES) is None


def test_the_slower_of_two_slow_nodes_is_named() -> None:
    found = straggler(run(*(spans(n, r3=2.0, r6=3.0) for n in range(10))), NODES, STAGES)
    assert found is not None
    assert found.node == 3


def test_the_report_s_health_says_it() -> None:
    found = health({0: {"train/skipped_steps": 0.0}}, 1, slow="node 1 (n1) is slow")
    assert found.kind == "warn"
    assert "node 1 (n1) is slow" in found.answer

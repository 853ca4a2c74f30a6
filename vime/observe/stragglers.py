"""The slowest node of the trainer, found from its ranks' times. Pure functions of spans."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vime.observe.timeline import WAIT, Span

SLOWER = 1.2
"""Ratio to the median above which a node is slow."""
ROLLOUTS = 10
"""Newest rollouts in each of which it has to be slow."""
_PHASES = ("ref_log_probs", "log_probs", "train")


@dataclass(frozen=True)
class Straggler:
    """A node whose ranks needed longer than others with the same work, rollout after rollout."""

    node: int
    ratio: float
    """Its time to the median of its pipeline stage, the mean of the rollouts."""
    phase: str
    """Where it loses most."""


def straggler(spans: Sequence[Span], nodes: Sequence[int], stages: Sequence[int]) -> Straggler | None:
    """The slowest node that was over SLOWER in each of the newest ROLLOUTS; None without one.

    `nodes` and `stages` hold each rank's logical node and pipeline stage. Compared are ranks of one stage, which have
    the same work, by their time without the wait for each other. A rank that slows others inside a layer (tensor,
    context or expert parallelism) slows their clocks too: what differs is then only what lies outside.
    """
    busy = _busy(spans)
    newest = sorted(busy)[-ROLLOUTS:]
    if len(newest) < ROLLOUTS:
        return None
    slow: dict[int, list[float]] = {}
    for rollout in newest:
        for node, ratio in _ratios({rank: sum(each.values()) for rank, each in busy[rollout].items()}, nodes, stages):
            slow.setdefault(node, []).append(ratio)
    found = {node: statistics.fmean(each) for node, each in slow.items() if min(each) > SLOWER}
    if not found:
        return None
    worst = max(found, key=lambda node: found[node])
    return Straggler(worst, found[worst], _worst_phase(busy[newest[-1]], worst, nodes, stages))


def _busy(spans: Sequence[Span]) -> dict[int, dict[int, dict[str, float]]]:
    """Seconds by rollout, rank and phase; the wait for other ranks, which lies in `train`, is taken off."""
    found: dict[int, dict[int, dict[str, float]]] = {}
    for span in spans:
        if not span.track.startswith("rank ") or span.name not in (*_PHASES, WAIT):
            continue
        phases = found.setdefault(span.rollout_id, {}).setdefault(int(span.track.split()[1]), {})
        name, seconds = ("train", -span.seconds) if span.name == WAIT else (span.name, span.seconds)
        phases[name] = phases.get(name, 0.0) + seconds
    return found


def _ratios(seconds: Mapping[int, float], nodes: Sequence[int], stages: Sequence[int]) -> list[tuple[int, float]]:
    """(node, its slowest rank's time to the median of the rank's stage) of a rollout."""
    of_stage: dict[int, list[float]] = {}
    for rank, each in seconds.items():
        of_stage.setdefault(stages[rank], []).append(each)
    medians = {stage: statistics.median_low(each) for stage, each in of_stage.items()}
    ratios: dict[int, float] = {}
    for rank, each in seconds.items():
        if medians[stages[rank]] > 0:
            ratios[nodes[rank]] = max(ratios.get(nodes[rank], 0.0), each / medians[stages[rank]])
    return list(ratios.items())


def _worst_phase(
    ranks: Mapping[int, Mapping[str, float]], node: int, nodes: Sequence[int], stages: Sequence[int]
) -> str:
    def excess(phase: str) -> float:
        seconds = {rank: each.get(phase, 0.0) for rank, each in ranks.items()}
        return max(
            own - statistics.median_low([each for other, each in seconds.items() if stages[other] == stages[rank]])
            for rank, own in seconds.items()
            if nodes[rank] == node
        )

    return max(_PHASES, key=excess)

"""Order of jobs of which at most K may run together: K lanes, in each of which one job runs at a time. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def turn(active: Iterable[str], known: Mapping[str, int], count: int) -> tuple[int, list[str]]:
    """Lane of the next job, of `count`, and the active jobs that it waits for.

    `known` holds the lanes of jobs. A job without a lane, or with one beyond `count`, is in every lane, since nothing
    says which others it runs beside. The next job goes to the lane with the fewest jobs and waits for all of them, not
    for the last one alone: if that one is cancelled while it waits, the ones before it still run.
    """
    lanes: list[list[str]] = [[] for _ in range(count)]
    for job in active:
        lane = known.get(job, count)
        for number in (lane,) if lane < count else range(count):
            lanes[number].append(job)
    chosen = min(range(count), key=lambda number: len(lanes[number]))
    return chosen, lanes[chosen]

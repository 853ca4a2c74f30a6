"""Deadlines of the tests: one number a kind of wait, in seconds, for a machine as slow as its session found it.

A wait reads a kind: `wait_until(ready, patience.ENGINE)`. Each is a base, right for two cores with nothing else to do,
times SCALE. The first process of a session measures SCALE; those below it read it in VIME_TEST_PATIENCE, which a person
sets to choose another: `VIME_TEST_PATIENCE=4 pytest …`.
"""

from __future__ import annotations

import math
import os
import time

from vime.errors import BadInput

VARIABLE = "VIME_TEST_PATIENCE"
QUIET_S = 0.25
"""Wall time of `workload` on one of two cores with nothing else to do."""
MOST = 8.0
"""Largest SCALE that is measured: beyond it a session had better wait than go on."""


def workload() -> float:
    """Wall time of a fixed piece of Python, in seconds."""
    begin, total = time.perf_counter(), 0
    for number in range(6_000_000):
        total += number * number % 7
    return time.perf_counter() - begin


def scale_of(wall_s: float, load: float, cores: int) -> float:
    """SCALE of a machine: how much slower than a quiet one it computed, and its load on each core on top.

    `wall_s` is the workload's time, `load` the mean number of processes that ran or wanted to in the last minute.
    """
    return min(MOST, max(1.0, wall_s / QUIET_S) + load / cores)


def read_scale(text: str) -> float:
    """SCALE as the environment gives it; BadInput unless it is a positive number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise BadInput(f"{VARIABLE} is {text!r}: give a positive number, such as 4, or unset it to have it measured")
    return value


def _session() -> float:
    """SCALE of this session, handed on to every process below this one."""
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = f"{scale_of(workload(), os.getloadavg()[0], os.cpu_count() or 1):.2f}"
    return read_scale(os.environ[VARIABLE])


SCALE = _session()

STUB = 3 * SCALE
"""A stub or a worker that is up answers; short, since some tests let it run out."""
MOMENT = 15 * SCALE
"""Something in a process that is up: a thread, a request to a stub, the end of a child that was told to."""
PROCESS = 120 * SCALE
"""A Python process or two: they start, import torch, do their small work and end."""
GROUP = 300 * SCALE
"""Several processes together: ranks of a trainer, a conversion, a pass over a tiny model."""
ANSWER = 60 * SCALE
"""An engine that is up answers a request."""
ENGINE = 400 * SCALE
"""A vLLM engine comes up on processors."""
TRAINING = 600 * SCALE
"""A tiny run trains a few rollouts, from the start of its job to its end; or a tool works as long as that."""
LEARNING = 1500 * SCALE
"""A tiny run trains until it has learned, or a command starts several such programs one after the other."""
NOTICE = 60 * SCALE
"""A run notices a fault, stops what is left of it and writes its last word."""
SLURM = 120 * SCALE
"""Slurm itself notices, ends, or shows a job, with the cluster's short SlurmdTimeout."""
JOB = 300 * SCALE
"""A job of stub stages comes out of the queue, goes through its stages and ends."""

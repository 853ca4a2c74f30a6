"""Waits of the controller's loop: signals and descriptors end them."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support import patience
from vime.launch.signals import Signals


@pytest.fixture
def signals() -> Iterator[Signals]:
    with Signals() as found:
        yield found


def ends(signals: Signals, *descriptors: int) -> bool:
    """True if a wait ends before its time."""
    began = time.monotonic()
    signals.wait(descriptors, patience.PROCESS)
    return time.monotonic() - began < patience.PROCESS / 2


def test_a_signal_ends_a_wait(signals: Signals) -> None:
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR2)).start()
    assert ends(signals)
    assert signals.take() is signal.SIGUSR2
    assert signals.take() is None


@pytest.mark.parametrize("least", [3, 1024], ids=["small", "beyond what select takes"])
def test_a_descriptor_ends_a_wait(signals: Signals, least: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2 * least)), hard))
    first, last = os.pipe()
    high = fcntl.fcntl(first, fcntl.F_DUPFD_CLOEXEC, least)
    try:
        os.write(last, b"x")
        assert high >= least
        assert ends(signals, high)
    finally:
        for descriptor in (first, last, high):
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_ends_the_run_comes_before_what_warns(signals: Signals) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert signals.take() is signal.SIGTERM

"""A signal during a block that must not be cut takes effect once the block is done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.support import patience
from vime.system.interrupts import ENDING, interrupts_later

HELD = """
import os, signal, sys
from vime.system.interrupts import interrupts_later
signal.signal(int(sys.argv[1]), signal.SIG_DFL)  # a process in the background may have been told to ignore it
with interrupts_later():
    os.kill(os.getpid(), int(sys.argv[1]))
    print("recorded", flush=True)
print("and on", flush=True)
"""


@pytest.mark.parametrize("number", ENDING)
def test_the_block_ends_before_the_signal_ends_the_process(number: signal.Signals) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELD, str(int(number))], capture_output=True, text=True, timeout=patience.PROCESS
    )
    assert done.stdout == "recorded\n"
    assert done.returncode == -number


@pytest.mark.usefixtures("interruptible")
def test_the_handlers_are_those_of_before() -> None:
    before = [signal.getsignal(number) for number in ENDING]
    with pytest.raises(KeyboardInterrupt), interrupts_later():
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in ENDING] == before


def test_a_thread_that_gets_no_signals_runs_the_block_too() -> None:
    done = []

    def work() -> None:
        with interrupts_later():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(patience.MOMENT)
    assert done == [True]

"""How every command ends: one line for an error of its kind or Ctrl-C, silence for a reader that has gone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import patience
from vime.cli import command
from vime.errors import BadInput, DeadlineExceeded, VimeError

TALKER = """
import sys
from vime.cli import command
@command
def main(argv):
    print("x" * 1_000_000)
    return 0
sys.exit(main([]))
"""


@pytest.mark.parametrize("error", [BadInput("--lr is 'a'"), DeadlineExceeded("no answer"), VimeError("broken")])
def test_an_error_is_one_line_and_an_exit_code(error: VimeError, capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(argv: object) -> int:
        raise error

    assert main([]) == error.cause
    assert capsys.readouterr() == ("", f"error: {error}\n")


def test_an_interrupted_command_says_so_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(argv: object) -> int:
        raise KeyboardInterrupt

    assert main([]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TALKER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as talker:
        assert talker.stdout is not None
        assert talker.stderr is not None
        talker.stdout.read(10)
        talker.stdout.close()
        assert talker.stderr.read() == ""
        assert talker.wait(patience.PROCESS) == 0


def test_the_arguments_are_the_processs_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vime", "--nodes", "2"])
    assert command(lambda argv: len(argv))() == 2

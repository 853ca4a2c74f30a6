"""Attempts of hostile programs in the sandbox, and what is left of them."""

import asyncio
import os
import shutil
import socket
import time
from pathlib import Path

import psutil
import pytest

from tests.support import patience
from vime.agents import sandbox
from vime.agents.sandbox import MOST_PROCESSES, Limits, run_python
from vime.errors import BadInput

pytestmark = pytest.mark.e2e

SMALL = Limits(seconds=patience.MOMENT, memory=64 * 2**20, output=16 * 1024)


@pytest.fixture(autouse=True)
def _bubblewrap():
    assert shutil.which("bwrap"), (
        "these tests need bubblewrap, which tools/test.sh installs: apt-get install bubblewrap"
    )


def alive(word):
    """Processes of this machine with the word in their command line, this one's left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if word.encode() in line and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


async def gone(word):
    end = time.monotonic() + patience.MOMENT
    while alive(word):
        assert time.monotonic() < end, f"{alive(word)} are alive"
        await asyncio.sleep(0.05)


async def test_a_program_prints_and_what_it_raises_is_part_of_its_output():
    outcome = await run_python("print(6 * 7)\nimport sys\nprint('x', file=sys.stderr)\n1 / 0", SMALL)
    assert outcome.output.startswith("42\nx\n")
    assert "ZeroDivisionError" in outcome.output
    assert outcome.failure == "exit 1"


async def test_a_fork_bomb_stays_small_and_is_ended_whole():
    word = "bomb5e1c"
    program = f"""
import os, sys
while True:
    try:
        if os.fork() == 0:
            os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(3600) # {word}"])
    except OSError:
        pass
"""
    run = asyncio.create_task(run_python(program, Limits(seconds=3.0, memory=256 * 2**20)))
    most = 0
    while not run.done():
        most = max(most, len(alive(word)))
        await asyncio.sleep(0.1)
    assert run.result().failure == "timeout"
    assert 1 < most <= MOST_PROCESSES
    await gone(word)


async def test_a_program_that_detaches_itself_ends_with_the_call():
    word = "daemon77aa"
    program = f"""
import os, sys, signal
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(3600) # {word}"])
    os._exit(0)
import time
time.sleep(0.5)
print("left")
"""
    outcome = await run_python(program, SMALL)
    assert outcome.output == "left\n"
    await gone(word)


async def test_a_program_that_outlives_its_time_is_ended_whatever_it_ignores():
    program = (
        "import signal, time\nfor n in range(1, 32):\n  try: signal.signal(n, signal.SIG_IGN)\n  except OSError: pass\n"
    )
    started = time.monotonic()
    outcome = await run_python(program + "print('on', flush=True)\nwhile True: pass", Limits(seconds=1.0))
    assert outcome.failure == "timeout"
    assert outcome.output == "on\n"
    assert time.monotonic() - started < patience.MOMENT


async def test_a_call_that_is_given_up_leaves_no_program_behind():
    word = "cancelled9b"
    program = (
        f"import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(3600) # {word}'])"
    )
    run = asyncio.create_task(run_python(program, SMALL))
    while not alive(word):  # noqa: ASYNC110 -- another process's start
        await asyncio.sleep(0.02)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    await gone(word)


async def test_a_program_whose_sandbox_is_killed_from_outside_is_lost_and_has_not_failed():
    program = asyncio.create_task(run_python("import time; time.sleep(600)", Limits(seconds=patience.PROCESS)))
    deadline = time.monotonic() + patience.MOMENT
    while not (found := [child for child in psutil.Process().children() if child.name() == "bwrap"]):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    found[0].kill()
    assert (await program).failure == "lost"


async def test_files_fill_no_more_than_their_share_and_no_other_place_takes_any():
    program = """
import os
total = 0
try:
    for number in range(200):
        with open(f"/tmp/{number}", "wb") as file:
            total += file.write(b"x" * 2**20)
except OSError as error:
    print("full", total <= 64 * 2**20, type(error).__name__)
for place in ("/", "/usr", "/dev", "/etc", "/proc", "/packages", "/var"):
    try:
        open(place + "/x", "wb").write(b"x")
        print("wrote", place)
    except OSError:
        pass
try:
    for number in range(64):
        open(f"/dev/shm/{number}", "wb").write(b"x" * 2**20)
    print("wrote shm")
except OSError:
    print("shm full")
"""
    outcome = await run_python(program, SMALL)
    assert outcome.output == "full True OSError\nshm full\n", outcome.output


async def test_memory_is_bounded():
    outcome = await run_python("x = bytearray(2**30)", SMALL)
    assert "MemoryError" in outcome.output


async def test_no_other_process_is_seen_or_reached(monkeypatch):
    monkeypatch.setenv("VIME_SECRET", "word-of-the-run")
    program = f"""
import os
print(sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()))
print(os.path.exists("/proc/{os.getpid()}/environ"), dict(os.environ).get("VIME_SECRET"))
for path in ("/proc/1/environ", "/proc/self/environ"):
    try:
        print(b"word-of-the-run" in open(path, "rb").read())
    except OSError:
        print(False)
try:
    os.kill({os.getpid()}, 0)
    print("reached")
except OSError:
    print("none")
print(os.getuid() == {sandbox.NOBODY}, os.uname().nodename)
"""
    outcome = await run_python(program, SMALL)
    lines = outcome.output.splitlines()
    assert len(eval(lines[0])) <= 3
    assert lines[1:] == ["False None", "False", "False", "none", "True sandbox"]


async def test_nothing_of_the_machine_but_its_programs_is_seen(tmp_path):
    (tmp_path / "plan.json").write_text("secret")
    places = [str(tmp_path), str(Path.home()), str(Path.cwd()), "/root", "/home", "/etc/passwd", "/var", "/sys", "/run"]
    outcome = await run_python(f"import os\nprint([p for p in {places!r} if os.path.exists(p)])", SMALL)
    assert outcome.output == "[]\n"


async def test_there_is_no_network_not_even_the_nodes_own():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        program = f"""
import socket
for address in (("127.0.0.1", {server.getsockname()[1]}), ("8.8.8.8", 53), ("10.0.0.1", 22)):
    try:
        socket.create_connection(address, 2)
        print("connected")
    except OSError as error:
        print("no")
print([name for _, name in socket.if_nameindex()])
"""
        outcome = await run_python(program, SMALL)
    assert outcome.output == "no\nno\nno\n['lo']\n"


async def test_a_program_gets_no_rights_of_its_own_namespace():
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.unshare(0x10000000), libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.sethostname(b"x", 1))
print([line for line in open("/proc/self/status") if line.startswith("CapEff")][0].split()[1].strip("0"))
"""
    outcome = await run_python(program, SMALL)
    assert outcome.output == "-1 -1 -1\n\n"


async def test_a_flood_of_output_is_cut_and_ends_the_program():
    outcome = await run_python("while True: print('x' * 1000)", SMALL)
    assert outcome.failure == "flood"
    assert len(outcome.output) <= SMALL.output


async def test_the_program_is_not_in_any_command_line():
    word = "hush42" * 3
    run = asyncio.create_task(run_python(f"import time\nx = '{word}'\nprint(1, flush=True)\ntime.sleep(1)", SMALL))
    await asyncio.sleep(0.7)
    assert alive(word) == []
    assert (await run).failure == ""


async def test_without_bubblewrap_the_tool_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BadInput, match=r"bubblewrap \(bwrap\) is not here: install it on the nodes"):
        await sandbox.check()


async def test_a_sandbox_that_does_not_start_is_refused_with_its_words(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho No permissions to create new namespace\nexit 1\n")
    fake.chmod(0o755)
    tmp_path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(
        BadInput, match=r"does not work on this node \(exit \d+: .*\): bubblewrap needs user namespaces"
    ):
        await sandbox.check()

"""Python that a model wrote, run in a bubblewrap sandbox: nothing of the run, no network, and an end to everything.

A program gets a user, process, network and mount namespace of its own, a read-only interpreter, an empty `/tmp` of
limited size, an empty environment, and limits of memory, processes and time. Its end ends whatever it started.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import stat
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vime.errors import BadInput

NOBODY = 65534
MOST_PROCESSES = 32
"""Processes and threads of a program at a time."""
_GRACE_SECONDS = 5.0
_CHECK = "print(6 * 7)"
_DEVICE_BYTES = 1 << 20
# The limits are set inside, so that they bind the program and not what starts it. The program comes by the standard
# input: a command line can be read by other users of the node.
_LAUNCHER = """
import resource, sys
memory, seconds, processes = map(int, sys.argv[1:4])
for kind, limit in (
    (resource.RLIMIT_AS, memory), (resource.RLIMIT_DATA, memory), (resource.RLIMIT_FSIZE, memory),
    (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_NPROC, processes), (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_NOFILE, 256),
):
    resource.setrlimit(kind, (limit, limit))
source = sys.stdin.read()
sys.stdin.close()
sys.argv = ["program.py"]
sys.path[:] = [path for path in sys.path if path] + ["/packages"]
exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
"""


@dataclass(frozen=True)
class Limits:
    """Limits of one program."""

    seconds: float = 30.0
    """Time on the clock, and of all its processors."""
    memory: int = 512 * 2**20
    """Bytes of a process's memory, and of all files together."""
    output: int = 64 * 1024
    """Bytes of its output; a program that writes more is ended."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    output: str
    """Standard output and error of the program, in order."""
    failure: str = ""
    """`timeout`, `flood`, `lost` (with its sandbox or node), or `exit CODE`; empty for a program that ended well."""


class Programs(Protocol):
    """A place where programs run."""

    async def check(self) -> None:
        """Run a first program wherever others will. Raises BadInput where the sandbox does not work."""
        ...

    async def run(self, source: str, limits: Limits) -> Outcome:
        """Run a program to its end; its time counts from when there is room for it."""
        ...

    def take_metrics(self) -> dict[str, float]:
        """Counts since the last call."""
        ...


class Here:
    """Programs on this node, all at once."""

    async def check(self) -> None:
        await check()

    async def run(self, source: str, limits: Limits) -> Outcome:
        return await run_python(source, limits)

    def take_metrics(self) -> dict[str, float]:
        return {}


def command(limits: Limits) -> list[str]:
    """Command line that runs the Python program of its standard input. Raises BadInput where there is no bubblewrap."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise BadInput(
            "the tool python runs in a sandbox, and bubblewrap (bwrap) is not here: install it on the nodes (in Debian "
            "the package bubblewrap), or leave python out of --tools"
        )
    python, folders = _interpreter()
    seconds = max(1, int(limits.seconds + 0.999))
    return [
        *_as_nobody(),
        *(bwrap, "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"),
        *("--unshare-cgroup-try", "--disable-userns", "--die-with-parent", "--new-session", "--hostname", "sandbox"),
        *("--uid", str(NOBODY), "--gid", str(NOBODY), "--cap-drop", "ALL", "--clearenv"),
        *("--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8"),
        *("--setenv", "OPENBLAS_NUM_THREADS", "1", "--setenv", "OMP_NUM_THREADS", "1"),
        *_system(),
        *(word for folder in folders for word in ("--ro-bind", folder, folder)),
        *_packages(),
        *("--proc", "/proc", "--dev", "/dev", "--size", str(_DEVICE_BYTES), "--tmpfs", "/dev/shm"),
        *("--remount-ro", "/dev", "--size", str(limits.memory), "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *("--remount-ro", "/", "--", python, "-I", "-B", "-u", "-c", _LAUNCHER),
        *(str(limits.memory), str(seconds), str(MOST_PROCESSES)),
    ]


async def run_python(source: str, limits: Limits) -> Outcome:
    """Run a program to its end. Raises BadInput where it cannot be started at all."""
    process = await asyncio.create_subprocess_exec(
        *command(limits),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={},
        cwd="/",
    )
    output = bytearray()
    failure = ""
    try:
        async with asyncio.timeout(limits.seconds):
            await asyncio.gather(_feed(process, source), _collect(process, output, limits.output))
            await process.wait()
    except TimeoutError:
        failure = "timeout"
    except _Flood:
        failure = "flood"
    finally:
        await _end(process)
    return Outcome(output.decode(errors="replace"), failure or _failure(process.returncode or 0))


def _failure(code: int) -> str:
    """Failure that an exit code of bubblewrap tells: it ends by a signal only if something outside kills it."""
    return "lost" if code < 0 else f"exit {code}" if code else ""


async def check() -> None:
    """Run a first program. Raises BadInput where the sandbox does not work here."""
    outcome = await run_python(_CHECK, Limits(seconds=60.0))
    if outcome.failure or outcome.output.strip() != "42":
        told = " ".join(outcome.output.split())[:300]
        raise BadInput(
            f"the sandbox of the tool python does not work on this node ({outcome.failure or 'wrong answer'}: {told}): "
            "bubblewrap needs user namespaces; ask for them, or leave python out of --tools"
        )


class _Flood(Exception):
    """The program wrote more than it may."""


async def _feed(process: asyncio.subprocess.Process, source: str) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(source.encode(errors="replace"))
        await process.stdin.drain()
    process.stdin.close()


async def _collect(process: asyncio.subprocess.Process, output: bytearray, most: int) -> None:
    assert process.stdout is not None
    while part := await process.stdout.read(65536):
        output += part[: most - len(output)]
        if len(output) >= most:
            raise _Flood


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill bubblewrap, whose end takes the whole process namespace along, and wait for it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    transport = process._transport  # type: ignore[attr-defined]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_GRACE_SECONDS):
            await process.wait()
    transport.close()


def _as_nobody() -> list[str]:
    """Root's processes know no limit of their number, so root starts the sandbox as nobody."""
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise BadInput("the tool python, used by root, needs setpriv (util-linux): install it, or run as another user")
    return [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]


def _system() -> Iterator[str]:
    yield from ("--ro-bind", "/usr", "/usr")
    for name in ("bin", "lib", "lib64", "lib32"):
        path = Path("/", name)
        if path.is_symlink():
            yield from ("--symlink", os.readlink(path), str(path))
        elif path.is_dir():
            yield from ("--ro-bind", str(path), str(path))
    # The linker's cache: libraries outside the standard folders are found by it.
    if Path("/etc/ld.so.cache").is_file():
        yield from ("--ro-bind", "/etc/ld.so.cache", "/etc/ld.so.cache")


@functools.cache
def _interpreter() -> tuple[str, list[str]]:
    """An interpreter, and the folders that have to be bound for it: this one, or the system's where nobody may not."""
    own = Path(sys.base_prefix)
    python = Path(os.path.realpath(sys.executable))
    if own.is_relative_to("/usr"):
        return str(python), []
    if _open_to_all(own) or os.geteuid() != 0:
        return str(python), [str(own)]
    if (system := shutil.which("python3", path="/usr/bin")) is not None:
        return system, []
    raise BadInput(f"the tool python finds no interpreter that other users may read: {own} is closed to them")


@functools.cache
def _packages() -> tuple[str, ...]:
    """Binding of the installed packages, for programs that compute with them, where the interpreter can use them."""
    folder = Path(sysconfig.get_path("purelib"))
    fits = not _interpreter()[0].startswith("/usr/bin/python3") or Path(sys.base_prefix).is_relative_to("/usr")
    same = f"python{sys.version_info.major}.{sys.version_info.minor}"
    fits = fits or os.path.basename(os.path.realpath("/usr/bin/python3")) == same
    if fits and (os.geteuid() != 0 or _open_to_all(folder)):
        return ("--ro-bind", str(folder), "/packages")
    return ()


def _open_to_all(folder: Path) -> bool:
    """Whether any user may enter the folder and those above it."""
    need = stat.S_IXOTH
    return all(path.stat().st_mode & need for path in (folder, *folder.parents))

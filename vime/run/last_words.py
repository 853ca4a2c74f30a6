"""Why a program ended, from the tail of its log: the most telling line, and the cause of known texts.

Shared by tracebacks of actors, engines and tools, and by srun's messages. Pure.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

from vime.errors import STORAGE_ERRNOS, Cause

MAX_CHARACTERS = 500

_PREFIX = re.compile(
    r"""^(?:
      \x1b\[[0-9;]*m                                            # colour
    | \([\w ./-]+?\ pid=\d+(?:,\ ip=[\w.:-]+)?\)\ ?             # Ray's and vLLM's name of a process
    | \[rank\d+\]:\ ?                                           # torchrun's
    | (?:ERROR|CRITICAL|WARNING|INFO)\ \d\d-\d\d\ [\d:]+\ \[[\w./]+:\d+\]\ ?   # vLLM's logger
    | \ *[|+](?:-+\ \d+\ -+|[-+]+)?\ ?                          # branches of an exception group
    )""",
    re.VERBOSE,
)
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:\([\w.]+\))?(?:: .*)?$")
_EXCEPTION_NAME = re.compile(
    r"^[\w.]*(?:Error|Exception|Interrupt|Timeout|Lost|Failed|Exceeded)(?:\([\w.]+\))?(?:: |$)"
)
_OWN_WORD = re.compile(r"^error: ")
_FATAL = re.compile(
    r"^Fatal Python error|^terminate called|^F\d{4} |Segmentation fault|Watchdog caught collective"
    r"|uncorrectable|NVRM: Xid"
)
_TELLING = re.compile(r"\berror\b|exception|\bfatal\b|not found|killed", re.IGNORECASE)
_POINTS_ELSEWHERE = re.compile(
    r"""^Traceback\ \(most\ recent|The\ above\ exception\ was|During\ handling\ of\ the\ above
      | [Ss]ee\ (?:stack\ trace\ for\ )?root\ cause|^(?:\w+\.)*(?:Base)?ExceptionGroup:\ |might\ be\ asynchronously
      | ^For\ debugging\ consider\ passing|^Compile\ with\ `
      | destroy_process_group\(\)|^srun:\ (?:error:|Terminating|launch/slurm:|Job\ step)|^slurmstepd
      | RayTaskError\(\w+\):\ ray::|^The\ actor\ never\ ran\ -""",
    re.VERBOSE,
)

GPU_FAULT = re.compile(
    r"""uncorrectable\ (?:ECC|NVLink)|double[- ]bit\ ECC|cudaErrorECCUncorrectable|CUDA_ERROR_ECC
      | fallen\ off\ the\ bus|GPU\ is\ lost|GPU_IS_LOST|hardware\ stack\ error
      | Xid\ \([^)]*\):\ (?:48|63|64|74|79|92|94|95|119|120|140|143)\b|unable\ to\ determine\ the\ device\ handle
      | NVLink\ (?:fatal\ )?error|GPU\ requires\ reset""",
    re.VERBOSE | re.IGNORECASE,
)
"""Texts of a failed GPU, its memory or its links. Xids from docs.nvidia.com whose action is to reset or replace."""
BROKEN_COLLECTIVE = re.compile(
    r"""nccl(?:Remote|System|Internal)Error|NCCL\ error.*(?:remote\ process\ exited|system\ error|internal\ error)
      | remote\ process\ exited\ or\ there\ was\ a\ network\ error|unhandled\ system\ error
      | Watchdog\ caught\ collective|ProcessGroupNCCL.*(?:stuck|timed\ out)
      | Timed\ out\ waiting\ \d+ms\ for\ (?:recv|send)
      | Connection\ closed\ by\ peer|Connection\ reset\ by\ peer|Broken\ pipe
      | Dist(?:Backend|Network|Store)Error|Engine\ ?core.*died\ unexpectedly|EngineDeadError""",
    re.VERBOSE | re.IGNORECASE,
)
_GPU_MEMORY = re.compile(r"CUDA out of memory|torch\.(?:cuda\.)?OutOfMemoryError|cudaErrorMemoryAllocation")
_STORAGE = re.compile("|".join(os.strerror(number) for number in sorted(STORAGE_ERRNOS)))


def cause_of_text(lines: Iterable[str]) -> Cause | None:
    """Cause that a text stands for; None if it is unknown.

    A broken collective is matched last: most other failures lead to one.
    """
    text = "\n".join(lines)
    if GPU_FAULT.search(text):
        return Cause.NODE_FAILURE
    if _GPU_MEMORY.search(text):
        return Cause.OUT_OF_MEMORY
    if _STORAGE.search(text):
        return Cause.STORAGE
    return Cause.CRASH if BROKEN_COLLECTIVE.search(text) else None


def telling_line(tail: Iterable[str]) -> str:
    """Most telling line of a tail, cut to 500 characters.

    In this order: the last vime message (`error: …`), exception or fatal error; a line that mentions an error; a line
    that points elsewhere ("see root cause above", a chained traceback's joints, srun's list of exit codes); the last
    line.
    """
    raw = [line for line in tail if line.strip()]
    lines = [_bare(line) for line in raw]
    plain = [i for i, line in enumerate(lines) if not _POINTS_ELSEWHERE.search(line.strip())]
    for chosen in (
        [i for i in plain if _is_strong(lines, i)],
        [i for i in plain if _TELLING.search(lines[i])],
        [i for i in range(len(lines)) if _TELLING.search(lines[i])],
        range(len(lines)),
    ):
        if chosen:
            return lines[chosen[-1]].strip()[:MAX_CHARACTERS]
    return "no output"


def _is_strong(lines: Sequence[str], i: int) -> bool:
    line = lines[i]
    if _OWN_WORD.match(line) or _FATAL.search(line) or _EXCEPTION_NAME.match(line):
        return True
    # An exception of any name, if a traceback's last frame precedes it.
    return i > 0 and lines[i - 1].startswith("  ") and _EXCEPTION.match(line) is not None


def _bare(line: str) -> str:
    """Line without the prefixes of loggers and launchers, its indentation kept."""
    line = line.rstrip()
    while (match := _PREFIX.match(line)) and match[0]:
        line = line[match.end() :]
    return line

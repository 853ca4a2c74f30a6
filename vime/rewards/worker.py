"""Worker process for reward functions and filters: one that hangs or crashes does not take the run with it.

Requests arrive as frames on standard input and are answered on standard output, one at a time; output that the
functions print goes to standard error. A frame is a length of four bytes, then a pickle (from the parent that started
this process) or JSON (the answer).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import pickle
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, BinaryIO, Never

from vime.errors import BadInput
from vime.system.processes import end_with_parent

LENGTH = struct.Struct("!I")
_TRACE_CHARACTERS = 600
MOST_BYTES_ADDED = 2**30


class TimeUp(BaseException):
    """Raised by the alarm; not an Exception, so that a function's own handlers let it through."""


def load(target: str) -> Callable[..., Any]:
    """The function that `package.module:function` names. Raises BadInput.

    A function `prepare` of its module runs first, outside of any call's time limit.
    """
    module, separator, name = target.partition(":")
    if not separator or not module or not name:
        raise BadInput(f"{target!r} is not a function: write package.module:function")
    try:
        value = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise BadInput(f"{target} cannot be loaded: {error}") from error
    if not callable(value):
        raise BadInput(f"{target} is a {type(value).__name__}, not a function")
    if callable(prepare := getattr(importlib.import_module(module), "prepare", None)):
        prepare()
    return value


def answer(function: Callable[..., Any], argument: Any, limit_s: float) -> dict[str, Any]:
    """Outcome of the call: `{"value": …}`, `{"timeout": …}` or `{"error": text}`."""
    own = getattr(function, "__module__", "").startswith("vime.")
    try:
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        try:
            with _bounded_memory() if own else contextlib.nullcontext():
                value = function(argument)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return {"value": _plain(value)}
    except TimeUp:
        return {"timeout": limit_s}
    except MemoryError:
        return {"error": "MemoryError"}
    except Exception as error:  # noqa: BLE001 -- plug-ins raise whatever they like; the parent decides what it means
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})"
        return {"error": text[:_TRACE_CHARACTERS]}


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    """Limit how much vime's own rewards may add to the process: a degenerate answer must not take the node's memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    limit = now + MOST_BYTES_ADDED
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(soft, limit), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _plain(value: Any) -> Any:
    """A number, a boolean or a list of them, unwrapped from numpy, torch and dictionaries."""
    if isinstance(value, dict):
        value = value["reward"] if "reward" in value else value["score"]
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, bool) else float(value)


def _time_up(_signal: int, _frame: FrameType | None) -> Never:
    raise TimeUp


def read_frame(stream: BinaryIO) -> bytes | None:
    head = stream.read(LENGTH.size)
    return stream.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else None


def main() -> None:
    end_with_parent(int(sys.argv[1]))
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    signal.signal(signal.SIGALRM, _time_up)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when this ends
    functions: dict[str, Callable[..., Any]] = {}

    def reply(content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        replies.write(LENGTH.pack(len(body)) + body)
        replies.flush()

    for target in sys.argv[2:]:
        try:
            functions[target] = load(target)
        except BadInput as error:
            reply({"bad_input": str(error)})
            return
    reply({"ready": os.getpid()})
    while (frame := read_frame(requests)) is not None:
        target, argument, limit_s = pickle.loads(frame)
        if target not in functions:
            functions[target] = load(target)
        reply(answer(functions[target], argument, limit_s))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main()

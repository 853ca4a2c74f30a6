"""`python -m vime.train --run DIR`: the driver of a run, a job step inside its Ray cluster."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import traceback

from vime.errors import Cause, VimeError, is_storage_error
from vime.run.folder import read_binding, read_plan
from vime.run.messages import report
from vime.run.plan import Binding, Plan
from vime.run.tokens import API_KEY, RAY_TOKEN, read_token


def connect(plan: Plan, binding: Binding) -> None:
    """Join the run's Ray cluster as its driver; the job's token is read from its private file."""
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=read_token(plan.run_dir, RAY_TOKEN), RAY_DEDUP_LOGS="0")
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    import ray

    address = f"{binding.nodes[0].address}:{plan.ports.gcs + binding.port_offset}"
    ray.init(address=address, namespace="vime", log_to_driver=True, logging_level=logging.WARNING)


def cause_of(error: BaseException) -> Cause:
    """The kind of a failure, looking through exception groups and Ray's wrappers."""
    from ray import exceptions

    if isinstance(error, BaseExceptionGroup):
        return cause_of(error.exceptions[0])
    # Before VimeError: Ray raises a class that is both, and whose `cause` is the error itself.
    if isinstance(error, exceptions.RayTaskError):
        return cause_of(error.cause) if isinstance(error.cause, BaseException) else Cause.CODE_ERROR
    if isinstance(error, VimeError):
        return error.cause
    if is_storage_error(error):
        return Cause.STORAGE
    if isinstance(error, (exceptions.OutOfMemoryError, MemoryError)):
        return Cause.OUT_OF_MEMORY
    if isinstance(error, (exceptions.NodeDiedError, exceptions.ActorUnavailableError)):
        return Cause.NODE_FAILURE
    return Cause.CODE_ERROR


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vime.train", description="The driver of a run.")
    parser.add_argument("--run", required=True, help="run folder with plan.json and binding.json")
    args = parser.parse_args(argv)
    try:
        plan, binding = read_plan(args.run), read_binding(args.run)
        connect(plan, binding)
    except VimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.cause)
    from vime.train.driver import Driver

    try:
        asyncio.run(Driver(plan, binding, read_token(plan.run_dir, API_KEY)).run())
    except Exception as error:  # noqa: BLE001 -- the last stop: any failure becomes its cause's exit code, in full text
        traceback.print_exception(error)
        cause = cause_of(error)
        print(f"error: training ended: {cause.name.lower()}: {_last_line(error)}", file=sys.stderr, flush=True)
        return int(cause)
    report("result")
    return int(Cause.SUCCESS)


def _last_line(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())

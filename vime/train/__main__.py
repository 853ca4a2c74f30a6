"""`python -m vime.train --run DIR`: the driver of a run, a job step inside its Ray cluster."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import time
import traceback

from vime.errors import Cause, VimeError
from vime.run.folder import read_binding, read_plan
from vime.run.messages import report
from vime.run.plan import Binding, Plan
from vime.run.tokens import API_KEY, RAY_TOKEN, read_token
from vime.train.causes import explain, ray_facts


def connect(plan: Plan, binding: Binding) -> None:
    """Join the run's Ray cluster as its driver; the job's token is read from its private file."""
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=read_token(plan.run_dir, RAY_TOKEN), RAY_DEDUP_LOGS="0")
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    import ray

    if plan.code is not None:
        # Ray puts the driver's working directory before all else where its actors look for modules.
        os.chdir(plan.code)
    address = f"{binding.nodes[0].address}:{plan.ports.gcs + binding.port_offset}"
    ray.init(address=address, namespace="vime", log_to_driver=True, logging_level=logging.WARNING)
    # Ray's own handler prints a stack trace of C++ and aborts, as if being asked to end were a fault.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vime.train", description="The driver of a run.")
    parser.add_argument("--run", required=True, help="run folder with plan.json and binding.json")
    args = parser.parse_args(argv)
    began = time.time()
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
        return int(account_for(error, plan, binding, began))
    report("result")
    return int(Cause.SUCCESS)


def account_for(error: Exception, plan: Plan, binding: Binding, began: float) -> Cause:
    """Tell the controller and the log why training, which began at this Unix time, ended."""
    account = explain(error, asyncio.run(ray_facts(plan, binding, error, began)))
    report("failure", **account.as_data())
    print(f"error: training ended: {account.cause.name.lower()}: {account.text}", file=sys.stderr, flush=True)
    return account.cause


if __name__ == "__main__":
    code = main()
    if code:
        # At its exit Ray would wait half a minute for ranks that hang since another died.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

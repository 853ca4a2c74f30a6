"""Cost of the rollout's own machinery, against stub servers that make tokens at a fixed speed.

    python tools/bench/rollout.py [--groups 512] [--samples 8]

The stubs run in a process of their own; everything else is real: sampler, dispatcher, clients, reward processes. Three
figures, each a ratio within this run:

- two engines against one: finished tokens a second, at least 1.8 x;
- idle share: the engine without a request while rewards keep their workers busy half of the time, under 2 %;
- slow rewards: time until all other groups are done where one group's rewards take seconds, at most 1.1 x that without.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from steady_engine import KEY, CharacterTokenizer, SteadyEngine

from vime.planning.build import Checks, make_plan
from vime.planning.cluster import load_cluster
from vime.recipe.load import load_recipe
from vime.rollout.client import EngineClient
from vime.rollout.dispatch import Patience
from vime.rollout.sampler import Sampler
from vime.samples import Rollout

TOKENS = 64
ROWS = 2000
SLOW_SECONDS = 3.0
SLOW_LABEL = "7"


REWARDS = f"""
import os, time

def quick(sample):
    return 1.0

def takes_its_time(sample):
    time.sleep(float(os.environ["BENCH_REWARD_SECONDS"]))
    return 1.0

def slow_for_one_group(sample):
    if sample.label == {SLOW_LABEL!r}:
        time.sleep({SLOW_SECONDS})
    return 1.0
"""


@dataclass(frozen=True)
class Load:
    """Groups of a rollout, answers a group, answers that an engine makes at once, tokens a second of each."""

    groups: int
    samples: int
    at_once: int
    speed: float

    @property
    def seconds(self) -> float:
        """Of the answers on one engine, if nothing else took time."""
        return self.groups * self.samples / self.at_once * TOKENS / self.speed


def serve(engines: int, load: Load, ports: Connection) -> None:
    """The stubs' process."""

    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            stubs = [SteadyEngine(TOKENS, load.speed, load.at_once) for _ in range(engines)]
            ports.send([(await stack.enter_async_context(stub)).port for stub in stubs])
            await asyncio.Event().wait()

    asyncio.run(run())


@contextlib.asynccontextmanager
async def sampler_of(folder: Path, engines: int, load: Load, reward: str, spare: int = 0) -> AsyncIterator[Sampler]:
    """A sampler of this many stubs; it may submit `spare` groups more than it needs."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(engines, load, sender), daemon=True)
    server.start()
    try:
        prompts = str(folder / "prompts.jsonl")
        flags = ["--prompt-data", prompts, "--eval-prompt-data", "none", prompts]
        flags += ["--rm-type", f"bench_rewards:{reward}"]
        flags += ["--rollout-batch-size", str(load.groups), "--n-samples-per-prompt", str(load.samples)]
        flags += ["--over-sampling-batch-size", str(load.groups + spare), "--num-steps-per-rollout", "1"]
        flags += ["--rollout-max-response-len", str(TOKENS), "--dynamic-sampling-filter-path", "none"]
        plan = make_plan(
            load_recipe("tiny-qwen3", [*flags, "--no-rollout-shuffle"]),
            cluster=load_cluster("local"),
            nodes=engines,
            base_dir=folder,
            run_dir=folder,
            checks=Checks(inputs=False, run_folder=False),
        )
        async with contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(EngineClient(f"http://127.0.0.1:{port}", KEY, concurrency=load.at_once))
                for port in receiver.recv()
            ]
            patience = Patience(stall=600)
            sampler = Sampler(plan, clients, patience=patience, tokenizer=CharacterTokenizer())
            yield await stack.enter_async_context(sampler)
    finally:
        server.terminate()
        server.join()


async def timed(folder: Path, engines: int, load: Load, reward: str, spare: int = 0) -> tuple[float, Rollout]:
    """Seconds of the first rollout, which has the prompt with slow rewards."""
    async with sampler_of(folder, engines, load, reward, spare) as sampler:
        start = time.monotonic()
        rollout = await sampler.generate(0)
        return time.monotonic() - start, rollout


def prepare(folder: Path) -> None:
    """Prompts, of which one row has the label with slow rewards, and the rewards as a module for the workers."""
    rows = ({"prompt": f"{number}+0=", "label": SLOW_LABEL if number == 7 else "x"} for number in range(ROWS))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bench_rewards.py").write_text(REWARDS)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


async def two_engines(folder: Path) -> float:
    """Finished tokens a second of two engines against one, all their places taken, at a load that one core can send."""
    load = Load(32, 8, at_once=32, speed=TOKENS / 3)
    one, _ = await timed(folder, 1, load, "quick")
    two, _ = await timed(folder, 2, load, "quick")
    print(f"one engine {one:.2f} s, two engines {two:.2f} s; {load.seconds:.2f} s and half of it without overhead")
    return one / two


async def idle_share(folder: Path, load: Load) -> float:
    """Share of the rollout in which the engine had no request; rewards keep two workers busy for half of the time."""
    os.environ["BENCH_REWARD_SECONDS"] = str(load.seconds / (load.groups * load.samples))
    seconds, rollout = await timed(folder, 1, load, "takes_its_time", spare=load.groups)
    idle = rollout.metrics["perf/engine_idle_share"]
    print(f"rollout with rewards {seconds:.2f} s, of which answers take {load.seconds:.2f} s; engine idle {idle:.2%}")
    return idle


async def slow_group(folder: Path, load: Load) -> float:
    """Seconds until all groups but one are finished, against those of a rollout without that one."""
    without, _ = await timed(folder, 1, load, "quick", spare=1)
    with_it, rollout = await timed(folder, 1, load, "slow_for_one_group", spare=1)
    late = [group for group in rollout.groups if group.samples[0].label == SLOW_LABEL]
    print(f"all quick {without:.2f} s; one group of slow rewards {with_it:.2f} s, {len(late)} of it in the rollout")
    return with_it / without


async def measure(folder: Path, groups: int, samples: int) -> bool:
    load = Load(groups, samples, at_once=256, speed=groups * samples / 256 * TOKENS / 16)
    ratio = await two_engines(folder)
    idle = await idle_share(folder, load)
    slow = await slow_group(folder, load)
    print(f"two engines {ratio:.2f} x one (at least 1.8)")
    print(f"engine idle {idle:.2%} (under 2 %)")
    print(f"with a slow group {slow:.3f} x without (at most 1.1)")
    return ratio >= 1.8 and idle < 0.02 and slow <= 1.1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=512)
    parser.add_argument("--samples", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        return 0 if asyncio.run(measure(Path(name), options.groups, options.samples)) else 1


if __name__ == "__main__":
    sys.exit(main())

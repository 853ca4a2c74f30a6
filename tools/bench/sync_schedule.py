"""The weight sync's schedule of DeepSeek-R1 from 128 trainer ranks to two engines of 64 GPUs, at its true shapes.

    python tools/bench/sync_schedule.py [--recipe deepseek-r1] [--nodes 16]

Makes the plan and its schedule without any checkpoint, checks that every node's buffer gets every element of every
tensor that its engines need exactly once, and prints time and memory. Exits 1 where an element is missing or comes
twice, or beyond 60 s of its processor or 4 GB.
"""

from __future__ import annotations

import argparse
import itertools
import math
import resource
import sys
import time
from collections.abc import Sequence

from vime.models.families import params_of
from vime.models.namemap import Where
from vime.planning.build import Checks, make_plan
from vime.planning.cluster import load_cluster
from vime.recipe.load import load_recipe
from vime.run.plan import Plan
from vime.sync.parts import Move
from vime.sync.schedule import Schedule, schedule_of

MOST_SECONDS, MOST_BYTES = 60.0, 4e9
Box = tuple[slice, ...]


def plan_of(recipe: str, nodes: int) -> Plan:
    return make_plan(
        load_recipe(recipe),
        cluster=load_cluster("local"),
        nodes=nodes,
        base_dir="/shared",
        run_dir="/shared/run",
        run_name="schedule",
        checks=Checks(inputs=False, run_folder=False),
    )


def volume(box: Box) -> int:
    return math.prod(part.stop - part.start for part in box)


def overlap(a: Box, b: Box) -> bool:
    return all(x.start < y.stop and y.start < x.stop for x, y in zip(a, b, strict=True))


def check_boxes(name: str, shape: Sequence[int], boxes: Sequence[Box]) -> list[str]:
    """Faults of boxes that should tile a tensor."""
    wrong = []
    if sum(map(volume, boxes)) != math.prod(shape):
        wrong.append(f"{name}: {sum(map(volume, boxes))} of {math.prod(shape)} elements")
    if any(overlap(a, b) for a, b in itertools.combinations(boxes, 2)):
        wrong.append(f"{name}: boxes overlap")
    return wrong


def check(plan: Plan, schedule: Schedule) -> tuple[list[str], int, int]:
    """Defects; moves; elements moved."""
    moved: dict[tuple[int, str], list[Move]] = {}
    for bucket in schedule.buckets:
        for move in schedule.moves(bucket.index):
            moved.setdefault((move.receiver, move.entry.name), []).append(move)
    wrong: list[str] = []
    for (receiver, name), moves in moved.items():
        boxes = [tuple(move.piece.source) for move in moves]
        wrong += check_boxes(f"receiver {receiver}, {name}", moves[0].entry.shape, boxes)
    for engine in plan.engines:
        mine = [number for number, receiver in enumerate(schedule.receivers) if engine.index in receiver.engines]
        for param in params_of(schedule.config):
            if param.where == Where.MTP:
                continue
            # A worker has all dense tensors; with expert parallelism each expert is on one worker of an engine.
            wanted = 1 if param.expert is not None and engine.expert_parallel else len(mine)
            for part in param.parts:
                found = sum((receiver, part.name) in moved for receiver in mine)
                if found != wanted:
                    wrong.append(f"engine {engine.index}: {found} of {wanted} workers get {part.name}")
    elements = sum(volume(tuple(move.piece.source)) for moves in moved.values() for move in moves)
    return wrong, sum(map(len, moved.values())), elements


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="deepseek-r1")
    parser.add_argument("--nodes", type=int, default=16)
    args = parser.parse_args()
    plan = plan_of(args.recipe, args.nodes)
    start = time.process_time()
    schedule = schedule_of(plan)
    made = time.process_time() - start
    wrong, moves, elements = check(plan, schedule)
    whole = time.process_time() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    engines = [f"DP{e.data_parallel_size} x TP{e.tensor_parallel_size}" for e in plan.engines]
    print(f"{len(plan.trainer_ranks)} ranks to {len(engines)} engines ({', '.join(engines)})")
    print(
        f"{len(schedule.buckets)} buckets for {len(schedule.receivers)} buffers; {moves} moves, {elements:.4g} elements"
    )
    print(f"schedule made in {made:.1f} s, made and checked in {whole:.1f} s; {memory / 1e9:.2f} GB")
    for line in wrong[:10]:
        print("WRONG", line)
    return int(bool(wrong) or whole > MOST_SECONDS or memory > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main())

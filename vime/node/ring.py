"""`python -m vime.node.ring --run DIR`: every node sends to the next one, all at once, and reports the bandwidth.

torch.distributed with gloo over TCP: it finds a cable, a switch port or a route that is far too slow. It does not
measure NCCL's own bandwidth.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time

from vime.errors import Cause
from vime.run.messages import report
from vime.run.tokens import group_key

RING = "ring"
"""Name of the stage."""
BYTES, PROBE_BYTES = 64 * 2**20, 2**20
ROUND_S = 0.5
"""Duration of a round on the slowest link, in seconds."""
ROUNDS = 3
"""The best one counts: a node may be busy for a moment."""
JOIN_S = 120.0


def measure(rank: int, world: int) -> float:
    """Bytes per second that came from the rank before."""
    import torch
    import torch.distributed as dist

    from vime.system.rendezvous import group_store

    key = group_key(os.environ)
    timeout = datetime.timedelta(seconds=JOIN_S)
    store = group_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank, world, timeout, key)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    first = torch.tensor(_round(rank, world, PROBE_BYTES))
    dist.all_reduce(first, dist.ReduceOp.MIN)
    # A network that is far too slow is seen with few bytes; a fast one needs many.
    size = min(BYTES, max(PROBE_BYTES, int(first.item() * ROUND_S)))
    best = max(_round(rank, world, size) for _ in range(ROUNDS))
    dist.destroy_process_group()
    return best


def _round(rank: int, world: int, size: int) -> float:
    """Bytes per second from the rank before, while every rank sends to the next one."""
    import torch
    import torch.distributed as dist

    outgoing, incoming = torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    dist.barrier()
    begin = time.perf_counter()
    sending = dist.isend(outgoing, (rank + 1) % world)
    receiving = dist.irecv(incoming, (rank - 1) % world)
    assert sending is not None
    assert receiving is not None
    receiving.wait()
    seconds = time.perf_counter() - begin
    sending.wait()
    return size / seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vime.node.ring", description="Measures the network of a run.")
    parser.add_argument("--run", required=True, help="run folder with plan.json and binding.json")
    parser.parse_args(argv)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        received = measure(rank, world)
    except RuntimeError as error:
        # What torch.distributed raises for a peer that does not come or goes away.
        print(f"error: rank {rank}: {error}", file=sys.stderr)
        return int(Cause.NODE_FAILURE)
    print(f"{received * 8 / 1e9:.2f} Gbit/s from the node before")
    report("result", host=os.uname().nodename, received=received)
    return 0


if __name__ == "__main__":
    sys.exit(main())

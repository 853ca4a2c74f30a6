"""A weight sync against its limit and its peer, in one run: DeepSeek-V3's expert shapes, EP2, one engine.

    python tools/bench/weight_sync.py [--experts 24] [--buffer-mb 64] [--repeats 10]

- limit: the bytes that the sync moves, ready-made, copied through the same channel by the same processes: shared memory
  to an engine on the trainer's node, gloo to one on another node
- peer: gather every tensor in bf16 on rank 0, then send the whole model to the engine over gloo
- quantisation alone against copying as many bytes as it reads and writes, on one core

Exits 1 where a figure falls short.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vime.fp8 import quantise as fp8
from vime.models.config import ModelConfig
from vime.models.families import params_of
from vime.models.namemap import Param
from vime.models.shards import holds, local_shape, tensor_split
from vime.recipe.parallel import ParallelLayout
from vime.run.plan import EnginePlan
from vime.sync.channel import Channel, Door, Listener
from vime.sync.parts import BUFFERS, FarGroup
from vime.sync.receivers import receivers_of
from vime.sync.schedule import Schedule, make_schedule
from vime.sync.segment import Segment, segment_name
from vime.sync.source import WeightSource

RANKS = 2
READER = RANKS
"""The process that stands for the engine: it copies every bucket out."""
LAYOUT = ParallelLayout(RANKS, ep=RANKS)
LOOPBACK = "127.0.0.1"
KEY = "of this bench alone"
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Setting:
    """Measured case."""

    experts: int
    buffer: int
    repeats: int
    folder: str


def model(experts: int) -> ModelConfig:
    """One MoE layer with DeepSeek-V3's hidden size, expert size and attention ranks."""
    return ModelConfig.from_hf(
        {
            "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "intermediate_size": 18432,
            "num_hidden_layers": 1, "first_k_dense_replace": 0, "num_attention_heads": 16, "num_key_value_heads": 16,
            "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "moe_intermediate_size": 2048, "n_routed_experts": experts, "n_shared_experts": 1,
            "num_experts_per_tok": 8, "n_group": 4, "topk_group": 2, "vocab_size": 1024,
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        }
    )  # fmt: skip


def schedule_of(setting: Setting, node: int) -> Schedule:
    """For an engine on a node; the trainer is on node 0."""
    config = model(setting.experts)
    engine = EnginePlan(index=0, nodes=(node,), gpus=((0,),), port=1, aux_port=2)
    receivers = receivers_of(config, [0] * RANKS, [engine])
    return make_schedule(config, LAYOUT, [0] * RANKS, receivers, setting.buffer)


def held(param: Param, config: ModelConfig, rank: int) -> bool:
    return holds(param, config, LAYOUT, LAYOUT.coordinates(rank))


def weights(config: ModelConfig, rank: int) -> dict[str, torch.Tensor]:
    """A rank's shards in bf16."""
    generator = torch.Generator().manual_seed(rank)
    found = {}
    for param in params_of(config):
        if held(param, config, rank):
            shape = local_shape(param, tensor_split(param, LAYOUT, LAYOUT.coordinates(rank))[1])
            found[param.name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    return found


class Everyone:
    """All processes, the reader included; torch's own group has the trainer's ranks only, as in a run."""

    def __init__(self, setting: Setting, rank: int, written: list[Semaphore], read: list[Semaphore]) -> None:
        store = dist.FileStore(f"{setting.folder}/everyone", RANKS + 1)
        self.written, self.read = written, read
        self.group = dist.ProcessGroupGloo(store, rank, RANKS + 1, timedelta(seconds=TIMEOUT_S))
        self.rank = rank

    def barrier(self) -> None:
        self.group.barrier().wait()

    def send(self, data: torch.Tensor, to: int) -> None:
        self.group.send([data], to, 0).wait()

    def receive(self, data: torch.Tensor, source: int) -> None:
        self.group.recv([data], source, 0).wait()

    def timed(self, repeats: int, once: Callable[[], None]) -> float:
        """The shortest of some runs, from a barrier to a barrier, in seconds."""
        best = math.inf
        for _ in range(repeats):
            self.barrier()
            started = time.perf_counter()
            once()
            self.barrier()
            best = min(best, time.perf_counter() - started)
        return best


@dataclass
class Member:
    """One process of a measurement over one schedule."""

    everyone: Everyone
    schedule: Schedule
    run: str
    into: torch.Tensor
    """Where the reader copies a bucket to."""
    source: WeightSource | None
    """Of a trainer's rank."""
    channel: Channel | None = None
    """For a far engine: the reader's end of the publisher's group, and on rank 0 the end of one for plain copies."""

    @property
    def rank(self) -> int:
        return self.everyone.rank

    @property
    def buckets(self) -> range:
        return range(len(self.schedule.buckets))

    def size(self, bucket: int) -> int:
        return self.schedule.places(bucket, 0)[1]

    def segments(self, *, write: bool) -> list[torch.Tensor]:
        names = [segment_name(self.run, 0, 0, number) for number in range(min(BUFFERS, len(self.buckets)))]
        return [torch.frombuffer(Segment.open(name, write=write).memory, dtype=torch.uint8) for name in names]

    def pipeline(self, write: Callable[[int], object]) -> None:
        """As in a sync: a bucket is written while the one before it is read, and read once the one before it was."""
        if self.rank != READER:
            for bucket in self.buckets:
                if bucket >= BUFFERS:
                    take(self.everyone.read[self.rank])
                write(bucket)
                self.everyone.written[self.rank].release()
            for _ in self.buckets[-BUFFERS:]:
                take(self.everyone.read[self.rank])
            return
        views = self.segments(write=False) if self.channel is None else []
        for bucket in self.buckets:
            for written in self.everyone.written:
                take(written)
            into = self.into[: self.size(bucket)]
            if self.channel is not None:
                self.channel.move(into)
            else:
                into.copy_(views[bucket % BUFFERS][: len(into)])
            for read in self.everyone.read:
                read.release()


def take(signal: Semaphore) -> None:
    if not signal.acquire(timeout=TIMEOUT_S):
        raise TimeoutError(f"another process of the benchmark was not done within {TIMEOUT_S:.0f} s")


def sync(member: Member) -> None:
    """One whole sync, memory made and given back included."""
    source = member.source
    if source is not None:
        source.prepare(1)
    member.everyone.barrier()

    def write(bucket: int) -> None:
        assert source is not None
        if bucket >= BUFFERS:
            source.release(bucket - BUFFERS)
        source.publish(bucket)

    member.pipeline(write)
    if source is not None:
        for bucket in member.buckets[-BUFFERS:]:
            source.release(bucket)
        source.finish()


def copy_near(member: Member, ready: torch.Tensor) -> None:
    """The same bytes through the same memory: each rank copies its half of a bucket, which lies ready."""
    made = []
    if member.rank == 0:
        sizes = [member.schedule.capacity(0, number) for number in range(min(BUFFERS, len(member.buckets)))]
        made = [Segment.create(segment_name(member.run, 0, 0, number), size) for number, size in enumerate(sizes)]
    member.everyone.barrier()
    views = member.segments(write=True) if member.rank != READER else []
    starts = [sum(map(member.size, range(bucket))) // 2 for bucket in member.buckets]

    def write(bucket: int) -> None:
        half = member.size(bucket) // 2
        mine = slice(half * member.rank, half * member.rank + half)
        views[bucket % BUFFERS][mine].copy_(ready[starts[bucket] : starts[bucket] + half])

    member.pipeline(write)
    for segment in made:
        segment.unlink()


def copy_far(member: Member, ready: torch.Tensor) -> None:
    """The same bytes through the same channel: rank 0 sends every bucket out of memory that lies ready."""
    start = 0
    for bucket in member.buckets:
        size = member.size(bucket)
        if member.channel is not None:
            member.channel.move(member.into[:size] if member.rank == READER else ready[start : start + size])
        start += size


def gather_and_broadcast(everyone: Everyone, config: ModelConfig, tensors: dict[str, torch.Tensor]) -> None:
    """The peer: the whole model in bf16 on rank 0, then to the engine."""
    rank, whole = everyone.rank, {}
    for param in params_of(config):
        if held(param, config, 0):
            if rank == 0:
                whole[param.name] = tensors[param.name]
        elif rank == 1:
            everyone.send(tensors[param.name], 0)
        elif rank == 0:
            whole[param.name] = torch.empty(param.shape, dtype=torch.bfloat16)
            everyone.receive(whole[param.name], 1)
    for param in params_of(config):
        if rank == 0:
            everyone.send(whole[param.name], READER)
        elif rank == READER:
            everyone.receive(torch.empty(param.shape, dtype=torch.bfloat16), 0)


def peak() -> int:
    """Most memory that this process has had at once, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def connect(member: Member, sender: Callable[[], tuple[int, Callable[[], Channel | None]]]) -> None:
    """Make the group to a far engine: `sender`, on rank 0, opens a port and then waits for the reader there."""
    port = torch.zeros(1, dtype=torch.int64)
    if member.rank == 0:
        number, accept = sender()
        port.fill_(number)
        member.everyone.send(port, READER)
        member.channel = accept()
    elif member.rank == READER:
        member.everyone.receive(port, 0)
        member.channel = Channel(Door(LOOPBACK, int(port), KEY), 1, 2, TIMEOUT_S)


def measure_copy(member: Member, repeats: int, moved: int) -> float:
    """Seconds of copying the bytes of a sync."""
    # Ones: zeros that nobody wrote are one page, which is read from the cache again and again.
    ready = torch.ones(moved // 2 + 1 if member.rank != READER else 0, dtype=torch.uint8)
    return member.everyone.timed(repeats, lambda: copy_near(member, ready))


def measure_far(member: Member, repeats: int) -> dict[str, float]:
    """Seconds of a sync to an engine on another node, and of sending the same bytes."""
    source = member.source

    def of_source() -> tuple[int, Callable[[], None]]:
        assert source is not None
        connect = source.connect
        ports = source.listen([FarGroup(0, 0, LOOPBACK, 0, 1, KEY)])
        return ports["0/0"], lambda: connect(TIMEOUT_S)

    def of_copy() -> tuple[int, Callable[[], Channel]]:
        listener = Listener(LOOPBACK, KEY)
        return listener.port, lambda: listener.accept(1, TIMEOUT_S)

    connect(member, of_source)
    found = {"far_sync": member.everyone.timed(repeats, lambda: sync(member))}
    connect(member, of_copy)
    # All of the bytes: one bucket again and again would come out of the processor's cache.
    ready = torch.ones(sum(map(member.size, member.buckets)) if member.rank == 0 else 0, dtype=torch.uint8)
    found["far_copy"] = member.everyone.timed(repeats, lambda: copy_far(member, ready))
    return found


def process(rank: int, setting: Setting, answers: Any, written: list[Semaphore], read: list[Semaphore]) -> None:
    # As in a run: the cores of a node are shared out among its processes, for copies and quantisation alike.
    torch.set_num_threads(threads())
    everyone = Everyone(setting, rank, written, read)
    if rank != READER:
        dist.init_process_group("gloo", init_method=f"file://{setting.folder}/ranks", rank=rank, world_size=RANKS)
    near, far = schedule_of(setting, 0), schedule_of(setting, 1)
    config = near.config
    tensors = weights(config, rank) if rank != READER else {}
    moved = sum(near.places(bucket.index, 0)[1] for bucket in near.buckets)
    into = torch.zeros(max(near.capacity(0, number) for number in range(BUFFERS)), dtype=torch.uint8)
    fp8.quantise(torch.zeros(128, 128, dtype=torch.bfloat16))

    def member(schedule: Schedule, run: str) -> Member:
        source = WeightSource(tensors, schedule, rank, run) if rank != READER else None
        return Member(everyone, schedule, run, into, source)

    here = member(near, setting.folder)
    before = peak()
    result: dict[str, Any] = {"moved": moved, "buckets": len(near.buckets)}
    result["sync"] = everyone.timed(setting.repeats, lambda: sync(here))
    result["extra_memory"] = peak() - before
    result["copy"] = measure_copy(here, setting.repeats, moved)
    result |= measure_far(member(far, setting.folder + "/far"), setting.repeats)
    result["peer"] = everyone.timed(1, lambda: gather_and_broadcast(everyone, config, tensors))
    answers.put((rank, result))


def threads() -> int:
    """Of each process."""
    return max(1, len(os.sched_getaffinity(0)) // (RANKS + 1))


def quantisation(repeats: int) -> tuple[float, float]:
    """Bytes a second of quantising one expert matrix (read and written), and of a copy of as many; one core."""
    torch.set_num_threads(1)
    matrices = [torch.randn(2048, 7168).to(torch.bfloat16) for _ in range(6)]
    outputs = [torch.empty(matrix.shape, dtype=torch.float8_e4m3fn) for matrix in matrices]
    moved = sum(matrix.nbytes + output.nbytes for matrix, output in zip(matrices, outputs, strict=True))
    from_, to = torch.ones(moved // 2, dtype=torch.uint8), torch.zeros(moved // 2, dtype=torch.uint8)

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return moved / min(times)

    quantised = best(lambda: [fp8.quantise(m, out=o) for m, o in zip(matrices, outputs, strict=True)])
    return quantised, best(lambda: to.copy_(from_))


def run(setting: Setting) -> dict[int, dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    signals = [[context.Semaphore(0) for _ in range(RANKS)] for _ in range(2)]
    processes = [context.Process(target=process, args=(rank, setting, answers, *signals)) for rank in range(RANKS + 1)]
    for each in processes:
        each.start()
    try:
        return dict(answers.get(timeout=600) for _ in processes)
    finally:
        for each in processes:
            each.join(10)
            each.kill()


@dataclass(frozen=True)
class Figure:
    """A ratio and its bound."""

    text: str
    value: float
    at_most: float = math.inf
    at_least: float = 0.0

    @property
    def reached(self) -> bool:
        return self.at_least <= self.value <= self.at_most

    def __str__(self) -> str:
        bound = f"at most {self.at_most:g}" if self.at_most < math.inf else f"at least {self.at_least:g}"
        return f"{self.text}: {self.value:.3f} ({bound}){'' if self.reached else '  FALLS SHORT'}"


def needed(config: ModelConfig) -> int:
    """Bytes of the model as the checkpoint stores it."""
    total = 0
    for param in params_of(config):
        for part in param.parts:
            size = math.prod(part.shape)
            total += size + 4 * math.prod(fp8.scale_shape(part.shape, (128, 128))) if part.quantised else 2 * size
    return total


def figures(
    results: dict[int, dict[str, Any]], setting: Setting, speeds: tuple[float, float]
) -> Iterator[str | Figure]:
    first = results[0]
    extra = max(results[rank]["extra_memory"] for rank in range(RANKS))
    cores = f"{len(os.sched_getaffinity(0))} cores, {threads()} threads a process"
    yield f"{cores}, {first['buckets']} buckets of at most {setting.buffer >> 20} MiB"
    yield f"shared memory: {first['moved'] / 1e9:.3f} GB in {first['sync']:.3f} s, a copy in {first['copy']:.3f} s"
    yield f"gloo: {first['far_sync']:.3f} s, a copy {first['far_copy']:.3f} s; the peer {first['peer']:.3f} s"
    yield f"quantisation {speeds[0] / 1e9:.2f} GB/s a core, copy {speeds[1] / 1e9:.2f} GB/s"
    yield f"memory over the shard {extra / 2**20:.0f} MiB"
    yield Figure("bytes sent / needed", first["moved"] / needed(model(setting.experts)), at_most=1.05)
    yield Figure("sync / copy, shared memory", first["sync"] / first["copy"], at_most=1.5)
    yield Figure("sync / copy, gloo", first["far_sync"] / first["far_copy"], at_most=1.5)
    yield Figure("gather and broadcast / sync, both over gloo", first["peer"] / first["far_sync"], at_least=3)
    yield Figure("gather and broadcast / sync, shared memory", first["peer"] / first["sync"], at_least=3)
    yield Figure("quantisation / copy bandwidth of a core", speeds[0] / speeds[1], at_least=0.5)
    yield Figure("memory over the shard / two buckets", extra / (2 * setting.buffer), at_most=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=24)
    parser.add_argument("--buffer-mb", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(arguments.experts, arguments.buffer_mb << 20, arguments.repeats, folder)
        results = run(setting)
    speeds = quantisation(arguments.repeats)
    found = list(figures(results, setting, speeds))
    for line in found:
        print(line)
    if arguments.json:
        arguments.json.write_text(json.dumps({"ranks": results, "quantisation": speeds}, indent=2) + "\n")
    return 0 if all(line.reached for line in found if isinstance(line, Figure)) else 1


if __name__ == "__main__":
    sys.exit(main())

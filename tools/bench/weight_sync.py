"""A weight sync against its limit and its peer, in one run: DeepSeek-V3's expert shapes, EP2, one engine on the node.

    python tools/bench/weight_sync.py [--experts 24] [--buffer-mb 64] [--repeats 3]

- limit: the bytes that the sync moves, ready-made, copied through the same shared memory by the same processes
- peer: gather every tensor in bf16 on rank 0, then broadcast the whole model to the engine over gloo
- quantisation alone against copying as many bytes as it reads and writes, on one core
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vime.checkpoint import fp8
from vime.models.config import ModelConfig
from vime.models.families import params_of
from vime.models.namemap import Param
from vime.models.shards import holds, local_shape, tensor_split
from vime.planning.types import EnginePlan
from vime.recipe.parallel import ParallelLayout
from vime.sync.plan import SLOTS, Schedule, make_schedule, receivers_of
from vime.sync.segment import Segment, segment_name
from vime.sync.source import WeightSource

RANKS = 2
READER = RANKS
"""The process that stands for the engine: it copies every bucket out."""
LAYOUT = ParallelLayout(RANKS, ep=RANKS)


@dataclass(frozen=True)
class Setting:
    """What is measured."""

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


def schedule_of(setting: Setting) -> Schedule:
    config = model(setting.experts)
    engine = EnginePlan(index=0, nodes=(0,), gpus=((0,),), port=1, aux_port=2)
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


def timed(repeats: int, once: Callable[[], None]) -> float:
    """The shortest of some runs, from a barrier to a barrier, in seconds."""
    best = math.inf
    for _ in range(repeats):
        dist.barrier()
        started = time.perf_counter()
        once()
        dist.barrier()
        best = min(best, time.perf_counter() - started)
    return best


def pipeline(rank: int, buckets: int, write: Callable[[int], None], read: Callable[[int], None]) -> None:
    """As in a sync: a bucket is written while the one before it is read."""
    for bucket in range(buckets + 1):
        if rank != READER and bucket < buckets:
            write(bucket)
        if rank == READER and bucket > 0:
            read(bucket - 1)
        dist.barrier()


def sync(rank: int, schedule: Schedule, source: WeightSource | None, run: str, into: torch.Tensor) -> None:
    """One whole sync, memory made and given back included."""
    if source is not None:
        source.prepare(1)
    else:
        dist.barrier()
    views = open_segments(run, len(schedule.buckets)) if rank == READER else []

    def write(bucket: int) -> None:
        assert source is not None
        if bucket >= SLOTS:
            source.release(bucket - SLOTS)
        source.publish(bucket)

    pipeline(rank, len(schedule.buckets), write, lambda bucket: copy_out(schedule, views, bucket, into))
    if source is not None:
        source.finish()


def open_segments(run: str, buckets: int) -> list[torch.Tensor]:
    names = [segment_name(run, 0, 0, slot) for slot in range(min(SLOTS, buckets))]
    return [torch.frombuffer(Segment.open(name).memory, dtype=torch.uint8) for name in names]


def copy_out(schedule: Schedule, views: list[torch.Tensor], bucket: int, into: torch.Tensor) -> None:
    size = schedule.places(bucket, 0)[1]
    into[:size].copy_(views[bucket % SLOTS][:size])


def plain_copy(rank: int, schedule: Schedule, run: str, ready: torch.Tensor, into: torch.Tensor) -> None:
    """The same bytes through the same memory: each rank copies its half of a bucket, which lies ready."""
    made = []
    if rank == 0:
        sizes = [schedule.capacity(0, slot) for slot in range(min(SLOTS, len(schedule.buckets)))]
        made = [Segment.create(segment_name(run, 0, 0, slot), size) for slot, size in enumerate(sizes)]
    dist.barrier()
    if rank == READER:
        views = open_segments(run, len(schedule.buckets))
    else:
        names = [segment_name(run, 0, 0, slot) for slot in range(min(SLOTS, len(schedule.buckets)))]
        views = [torch.frombuffer(Segment.open(name, write=True).memory, dtype=torch.uint8) for name in names]
    starts = [0]
    for bucket in schedule.buckets:
        starts.append(starts[-1] + schedule.places(bucket.index, 0)[1])

    def write(bucket: int) -> None:
        half = (starts[bucket + 1] - starts[bucket]) // 2
        mine = slice(half * rank, half * rank + half)
        source = ready[starts[bucket] // 2 : starts[bucket] // 2 + half]
        views[bucket % SLOTS][mine].copy_(source)

    pipeline(rank, len(schedule.buckets), write, lambda bucket: copy_out(schedule, views, bucket, into))
    for segment in made:
        segment.unlink()


def gather_and_broadcast(rank: int, config: ModelConfig, tensors: dict[str, torch.Tensor]) -> None:
    """The peer: the whole model in bf16 on rank 0, then to the engine."""
    whole = {}
    for param in params_of(config):
        owner = 0 if held(param, config, 0) else 1
        if rank == READER:
            continue
        if owner == rank:
            whole[param.name] = tensors[param.name]
        elif rank == 0:
            whole[param.name] = torch.empty(param.shape, dtype=torch.bfloat16)
        if owner == 1:
            if rank == 1:
                dist.send(tensors[param.name], 0)
            elif rank == 0:
                dist.recv(whole[param.name], 1)
    for param in params_of(config):
        if rank == 0:
            dist.send(whole[param.name], READER)
        elif rank == READER:
            dist.recv(torch.empty(param.shape, dtype=torch.bfloat16), 0)


def peak() -> int:
    """Most memory that this process has had at once, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def process(rank: int, setting: Setting, answers: Any) -> None:
    torch.set_num_threads(1)
    store = f"file://{setting.folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS + 1)
    schedule, run = schedule_of(setting), setting.folder
    config = schedule.config
    tensors = weights(config, rank) if rank != READER else {}
    shard_bytes = sum(tensor.nbytes for tensor in tensors.values())
    source = WeightSource.of_tensors(tensors, schedule, rank, run) if rank != READER else None
    moved = sum(schedule.places(bucket.index, 0)[1] for bucket in schedule.buckets)
    into = torch.zeros(max(schedule.capacity(0, slot) for slot in range(SLOTS)), dtype=torch.uint8)
    fp8.quantise(torch.zeros(128, 128, dtype=torch.bfloat16))
    before = peak()
    result: dict[str, Any] = {"moved": moved, "buckets": len(schedule.buckets), "shard": shard_bytes}
    result["sync"] = timed(setting.repeats, lambda: sync(rank, schedule, source, run, into))
    result["extra_memory"] = peak() - before
    ready = torch.zeros(moved // 2 + 1, dtype=torch.uint8) if rank != READER else torch.empty(0)
    result["copy"] = timed(setting.repeats, lambda: plain_copy(rank, schedule, run, ready, into))
    result["peer"] = timed(1, lambda: gather_and_broadcast(rank, config, tensors))
    answers.put((rank, result))


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
    processes = [context.Process(target=process, args=(rank, setting, answers)) for rank in range(RANKS + 1)]
    for each in processes:
        each.start()
    try:
        return dict(answers.get(timeout=600) for _ in processes)
    finally:
        for each in processes:
            each.join(10)
            each.kill()


def lines(results: dict[int, dict[str, Any]], setting: Setting, speeds: tuple[float, float]) -> Iterator[str]:
    first = results[0]
    config = model(setting.experts)
    needed = 0
    for param in params_of(config):
        for part in param.parts:
            size = math.prod(part.shape)
            needed += size + 4 * math.prod(fp8.scale_shape(part.shape, (128, 128))) if part.quantised else 2 * size
    extra = max(results[rank]["extra_memory"] for rank in range(RANKS))
    yield f"cores {len(os.sched_getaffinity(0))}, {first['buckets']} buckets of at most {setting.buffer >> 20} MiB"
    yield f"bytes: {first['moved'] / 1e9:.3f} GB moved, {first['moved'] / needed:.3f} x needed (at most 1.05)"
    yield f"sync {first['sync']:.3f} s, {first['moved'] / first['sync'] / 1e9:.2f} GB/s"
    yield f"limit, plain copy of the same bytes: {first['copy']:.3f} s; sync is {first['sync'] / first['copy']:.2f} x"
    yield f"peer, gather and broadcast: {first['peer']:.3f} s; sync is {first['peer'] / first['sync']:.1f} x as fast"
    yield f"memory over the shard: {extra / 2**20:.0f} MiB (two buckets are {2 * setting.buffer >> 20} MiB)"
    yield (
        f"quantisation {speeds[0] / 1e9:.2f} GB/s a core, copy {speeds[1] / 1e9:.2f} GB/s: "
        f"{speeds[0] / speeds[1]:.0%} (at least 50 %)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=24)
    parser.add_argument("--buffer-mb", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(arguments.experts, arguments.buffer_mb << 20, arguments.repeats, folder)
        results = run(setting)
    speeds = quantisation(arguments.repeats)
    for line in lines(results, setting, speeds):
        print(line)
    if arguments.json:
        arguments.json.write_text(json.dumps({"ranks": results, "quantisation": speeds}, indent=2) + "\n")


if __name__ == "__main__":
    main()

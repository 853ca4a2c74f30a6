"""Weight sync between GPUs of one host: a trainer with EP x PP2 to an engine with EP over all, on the same GPUs.

    python tools/bench/gpu/weight_sync.py [--gpus 8] [--experts 32] [--buffer-mb 512]

DeepSeek-V3's expert shapes, in bf16 and in block fp8. Every tensor of every worker is compared with the whole weight.

- limit: an NCCL all-to-all of as many bytes
- peer: every tensor in bf16 broadcast to all ranks by the one that has it

Prints its ratios last and exits 1 where one falls short. `--device cpu --small` runs the same over gloo, to test the
script; its ratios mean nothing.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from vime.fp8 import quantise as fp8
from vime.models.config import ModelConfig
from vime.models.families import params_of
from vime.models.namemap import Param
from vime.models.shards import holds
from vime.models.transform import split
from vime.recipe.parallel import ParallelLayout
from vime.run.plan import EnginePlan
from vime.sync.buffers import entry_views
from vime.sync.receivers import receivers_of
from vime.sync.schedule import Schedule, make_schedule
from vime.sync.source import WeightSource

BLOCK = (128, 128)


@dataclass(frozen=True)
class Setting:
    """Measured case."""

    gpus: int
    experts: int
    buffer: int
    repeats: int
    device: str
    small: bool
    folder: str


def model(setting: Setting, *, quantised: bool) -> ModelConfig:
    """Two MoE layers with DeepSeek-V3's hidden size, expert size and attention ranks."""
    hidden, expert = (256, 128) if setting.small else (7168, 2048)
    hf: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": hidden, "intermediate_size": 4 * hidden,
        "num_hidden_layers": 2, "first_k_dense_replace": 0, "num_attention_heads": 16, "num_key_value_heads": 16,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "moe_intermediate_size": expert, "n_routed_experts": setting.experts, "n_shared_experts": 1,
        "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "vocab_size": 1024,
    }  # fmt: skip
    if quantised:
        hf["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
    return ModelConfig.from_hf(hf)


def schedule_of(setting: Setting, *, quantised: bool) -> Schedule:
    world = setting.gpus
    config = model(setting, quantised=quantised)
    slots = tuple(range(world))
    engine = EnginePlan(
        index=0, nodes=(0,), gpus=(slots,), data_parallel_size=world, expert_parallel=True, port=1, aux_port=2
    )
    receivers = receivers_of(config, [0] * world, [engine], gpus=slots)
    layout = ParallelLayout(world, pp=2, ep=world // 2)
    return make_schedule(config, layout, [0] * world, receivers, setting.buffer)


def whole(param: Param, device: torch.device) -> torch.Tensor:
    """A parameter's weights: the same on every rank."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(param.name.encode()))
    return torch.empty(param.shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)


def one_sync(source: WeightSource, look: Callable[[int], None] | None = None) -> None:
    for bucket in range(source.prepare(1)):
        source.publish(bucket)
        if look is not None:
            look(bucket)
        source.release(bucket)
    source.finish()


def compare(source: WeightSource, bucket: int, device: torch.device) -> None:
    """Check that this rank's buffer holds the quantised whole weights."""
    schedule = source.schedule
    for number, receiver in enumerate(schedule.receivers):
        if source.rank not in receiver.publishers:
            continue
        data = source._buffers.of(bucket, number).data
        for place in schedule.places(bucket, number)[0]:
            entry = place.entry
            got, scales = entry_views(data, place, schedule.block)
            wanted = split(entry.param, whole(entry.param, device))[entry.param.parts[entry.part].name]
            if scales is None:
                assert torch.equal(got, wanted.to(got.dtype)), entry.name
                continue
            codes, wanted_scales = fp8.quantise(wanted.cpu(), schedule.block)
            assert torch.equal(got.cpu().view(torch.uint8), codes.view(torch.uint8)), entry.name
            assert torch.equal(scales.cpu(), wanted_scales), entry.name


def broadcast_all(schedule: Schedule, tensors: dict[str, torch.Tensor], rank: int, device: torch.device) -> None:
    """The peer. Nothing is kept: a real one would need the whole model in the memory of every GPU."""
    for param in params_of(schedule.config):
        (owner,) = schedule.holders(param)
        data = tensors[param.name] if rank == owner else torch.empty(param.shape, dtype=torch.bfloat16, device=device)
        dist.broadcast(data, owner)


def measure(setting: Setting, rank: int, device: torch.device, *, quantised: bool) -> dict[str, float]:
    schedule = schedule_of(setting, quantised=quantised)
    coords = schedule.layout.coordinates(rank)
    held = [param for param in params_of(schedule.config) if holds(param, schedule.config, schedule.layout, coords)]
    tensors = {param.name: whole(param, device) for param in held}
    source = WeightSource(tensors, schedule, rank, setting.folder)
    moved = [
        sum(schedule.places(bucket.index, number)[1] for bucket in schedule.buckets) for number in range(setting.gpus)
    ]
    one_sync(source, lambda bucket: compare(source, bucket, device))

    each = moved[rank] // setting.gpus
    outgoing = torch.zeros(each * setting.gpus, dtype=torch.uint8, device=device)
    incoming = torch.empty_like(outgoing)

    def all_to_all() -> None:
        if device.type == "cuda":
            dist.all_to_all_single(incoming, outgoing)
        else:
            dist.all_gather(list(incoming.chunk(setting.gpus)), outgoing[:each])

    found = {"moved": float(sum(moved)), "needed": float(needed(schedule)), "buckets": float(len(schedule.buckets))}
    found["sync"] = timed(setting, device, lambda: one_sync(source))
    found["limit"] = timed(setting, device, all_to_all)
    found["peer"] = timed(setting, device, lambda: broadcast_all(schedule, tensors, rank, device))
    return found


def needed(schedule: Schedule) -> int:
    """Bytes of what all workers load, as the checkpoint stores it."""
    total = 0
    for receiver in schedule.receivers:
        for bucket in schedule.buckets:
            for entry in bucket.entries:
                if receiver.needs(entry):
                    scales = math.prod(fp8.scale_shape(entry.shape, BLOCK)) if entry.quantised else 0
                    total += entry.bytes + 4 * scales
    return total


def timed(setting: Setting, device: torch.device, once: Callable[[], None]) -> float:
    """The shortest of some runs after one more, from a barrier to a barrier, in seconds."""
    best = math.inf
    for run in range(setting.repeats + 1):
        dist.barrier()
        started = time.perf_counter()
        once()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        dist.barrier()
        if run:
            best = min(best, time.perf_counter() - started)
    return best


def process(rank: int, setting: Setting, answers: Any) -> None:
    device = torch.device(setting.device, rank) if setting.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{setting.folder}/s", rank=rank, world_size=setting.gpus)
    found = {kind: measure(setting, rank, device, quantised=kind == "fp8") for kind in ("bf16", "fp8")}
    if rank == 0:
        answers.put(found)
    dist.destroy_process_group()


def lines(found: dict[str, dict[str, float]]) -> Iterator[tuple[str, bool]]:
    """Text to print, and whether the result is good."""
    for kind, one in found.items():
        size, seconds = one["moved"] / 1e9, one["sync"]
        yield f"{kind}: {size:.2f} GB in {one['buckets']:.0f} buckets, {seconds:.4f} s, {size / seconds:.1f} GB/s", True
    for kind, one in found.items():
        for text, value, good in (
            ("bytes sent / needed (at most 1.05)", one["moved"] / one["needed"], one["moved"] <= 1.05 * one["needed"]),
            ("all-to-all / sync (at least 0.6)", one["limit"] / one["sync"], one["limit"] >= 0.6 * one["sync"]),
            ("broadcast of all / sync (at least 3)", one["peer"] / one["sync"], one["peer"] >= 3 * one["sync"]),
        ):
            yield f"{kind}, {text}: {value:.3f}{'' if good else '  FALLS SHORT'}", good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--buffer-mb", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny matrices")
    given = parser.parse_args()
    if given.device == "cuda" and torch.cuda.device_count() < given.gpus:
        parser.error(f"--gpus {given.gpus}, but this host has {torch.cuda.device_count()}: give fewer")
    if given.gpus % 2 or given.experts % given.gpus:
        parser.error(f"--gpus {given.gpus} must be even and divide --experts {given.experts}")
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            given.gpus, given.experts, given.buffer_mb << 20, given.repeats, given.device, given.small, folder
        )
        ranks = [context.Process(target=process, args=(rank, setting, answers)) for rank in range(given.gpus)]
        for each in ranks:
            each.start()
        try:
            found = answers.get(timeout=900)
        finally:
            for each in ranks:
                each.join(10)
                each.kill()
    results = list(lines(found))
    for text, _ in results:
        print(text)
    return 0 if all(good for _, good in results) else 1


if __name__ == "__main__":
    sys.exit(main())

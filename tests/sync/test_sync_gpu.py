"""On GPUs: buckets in their memory, quantised there, mapped by another process or sent to another GPU; bit-equal with
the CPU's formulas."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import patience, tiny_hf
from tests.support.plans import engine_plan
from tests.support.small_models import Tensors, shards, trained
from vime.errors import VimeError
from vime.fp8 import quantise as fp8
from vime.models.config import ModelConfig
from vime.recipe.parallel import ParallelLayout
from vime.sync.digest import trainer_digests
from vime.sync.receivers import receivers_of
from vime.sync.schedule import far_groups, make_schedule
from vime.sync.source import WeightSource

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

HF = tiny_hf.with_fp8(tiny_hf.DEEPSEEK, (16, 16))
READER = """
import hashlib, json, sys, torch
from vime.sync.cuda_memory import map_shared
mapped = {}
for line in sys.stdin:
    info = json.loads(line)
    data = mapped.setdefault(json.dumps(info["handle"]), None)
    if data is None:
        data = mapped[json.dumps(info["handle"])] = map_shared(info["handle"])
    print(hashlib.sha256(data[: info["size"]].cpu().numpy().data).hexdigest(), flush=True)
"""

RECEIVER = """
import hashlib, sys, torch
from vime.sync.channel import Channel, Door
channel = Channel(Door("127.0.0.1", int(sys.argv[1]), sys.argv[2]), 1, 2, 60, torch.device("cuda", 1))
for line in sys.stdin:
    data = torch.empty(int(line), dtype=torch.uint8, device="cuda:1")
    channel.move(data)
    print(hashlib.sha256(data.cpu().numpy().data).hexdigest(), flush=True)
"""
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def source_of(run: str, held: Tensors, *, engine_node: int = 0) -> WeightSource:
    config = ModelConfig.from_hf(HF)
    receivers = receivers_of(config, [0], [engine_plan(0, {engine_node: (0,)})], gpus=[0])
    schedule = make_schedule(config, ParallelLayout(), [0], receivers, 100_000, draft=True, mtp_trained=True)
    return WeightSource(held, schedule, 0, run)


def streams(source: WeightSource, version: int) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Every bucket's description and bytes."""
    found = []
    for bucket in range(source.prepare(version)):
        info = source.publish(bucket)["0"]
        found.append((info, source._buffers.of(bucket, 0).data[: info["size"]].cpu().clone()))
        source.release(bucket)
    source.finish()
    return found


def assert_same_tensors(info: dict[str, Any], ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Of two streams of a bucket; what lies between tensors is nothing."""
    for name, kind, shape, offset, scales in info["tensors"]:
        size = torch.Size(shape).numel() * getattr(torch, kind).itemsize
        assert torch.equal(ours[offset : offset + size], theirs[offset : offset + size]), name
        if scales is not None:
            end = scales + 4 * torch.Size(fp8.scale_shape(shape, (16, 16))).numel()
            assert torch.equal(ours[scales:end], theirs[scales:end]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpus_stream_is_the_cpus(tmp_path: Path, dtype: torch.dtype) -> None:
    held = {name: tensor.to(dtype) for name, tensor in shards(HF, trained(HF, 1), ParallelLayout(), 0).items()}
    here = source_of(str(tmp_path), held)
    there = source_of(str(tmp_path), {name: tensor.cuda() for name, tensor in held.items()})
    for (info, ours), (_, theirs) in zip(streams(there, 1), streams(here, 1), strict=True):
        assert_same_tensors(info, ours, theirs)
    cpu = trainer_digests(here.schedule, 0, held, None)
    assert there.digests() == cpu


def test_another_process_maps_what_was_published(tmp_path: Path) -> None:
    held = {name: tensor.cuda() for name, tensor in shards(HF, trained(HF, 1), ParallelLayout(), 0).items()}
    source = source_of(str(tmp_path), held)
    with subprocess.Popen(
        [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        for bucket in range(source.prepare(1)):
            info = source.publish(bucket)["0"]
            reader.stdin.write(json.dumps(info) + "\n")
            reader.stdin.flush()
            data = source._buffers.of(bucket, 0).data[: info["size"]].cpu()
            assert reader.stdout.readline().strip() == hashlib.sha256(data.numpy().data).hexdigest()
            source.release(bucket)
        reader.stdin.close()
        assert reader.wait(patience.PROCESS) == 0
    source.finish()


def test_buckets_for_a_node_of_its_own_lie_on_the_gpu_and_go_through_nccl(tmp_path: Path) -> None:
    """One GPU can hold one member of a group: the publisher sends to nobody, from its sending thread."""
    held = {name: tensor.cuda() for name, tensor in shards(HF, trained(HF, 1), ParallelLayout(), 0).items()}
    near, far = source_of(str(tmp_path), held), source_of(str(tmp_path), held, engine_node=1)
    group = far_groups(far.schedule, engine_plan(0, {1: (0,)}), ["127.0.0.1", "127.0.0.2"])
    far.listen([replace(one, workers=0) for one in group])
    far.connect(60)
    for (ours, sent), (_, mapped) in zip(streams(far, 1), streams(near, 1), strict=True):
        assert ours["handle"] is None
        assert ours["segment"] is None
        assert_same_tensors(ours, sent, mapped)


@contextlib.contextmanager
def receiver_on_the_other_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeout_s: float = patience.PROCESS
) -> Iterator[tuple[WeightSource, subprocess.Popen[str]]]:
    """A process on the second GPU in a group with a source on the first."""
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    held = {name: tensor.cuda() for name, tensor in shards(HF, trained(HF, 1), ParallelLayout(), 0).items()}
    source = source_of(str(tmp_path), held, engine_node=1)
    far = far_groups(source.schedule, engine_plan(0, {1: (0,)}), ["127.0.0.1", "127.0.0.2"])
    (port,) = source.listen(far).values()
    with subprocess.Popen(
        [sys.executable, "-c", RECEIVER, str(port), far[0].key],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as receiver:
        source.connect(timeout_s)
        try:
            yield source, receiver
        finally:
            receiver.kill()


@two_gpus
def test_another_gpu_gets_through_nccl_what_was_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver_on_the_other_gpu(tmp_path, monkeypatch) as (source, receiver):
        assert receiver.stdin is not None
        assert receiver.stdout is not None
        for bucket in range(source.prepare(1)):
            info = source.publish(bucket)["0"]
            receiver.stdin.write(f"{info['size']}\n")
            receiver.stdin.flush()
            data = source._buffers.of(bucket, 0).data[: info["size"]].cpu()
            assert receiver.stdout.readline().strip() == hashlib.sha256(data.numpy().data).hexdigest()
            source.release(bucket)
        source.finish()


@two_gpus
def test_a_receiver_that_is_gone_is_an_error_at_the_groups_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiver_on_the_other_gpu(tmp_path, monkeypatch, timeout_s=patience.MOMENT) as (source, receiver):
        receiver.kill()
        receiver.wait()
        (channel,) = source._channels.values()
        started = time.monotonic()
        with pytest.raises(VimeError, match="the weight group broke"):
            # Larger than what NCCL takes into buffers of its own before anybody reads.
            channel.move(torch.zeros(1 << 30, dtype=torch.uint8, device="cuda:0"))
        assert time.monotonic() - started < patience.PROCESS


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    held = {name: tensor.cuda() for name, tensor in shards(HF, trained(HF, 1), ParallelLayout(), 0).items()}
    held["decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"][45, 3] = float("nan")
    source = source_of(str(tmp_path), held)
    buckets = source.prepare(1)
    with pytest.raises(fp8.WeightNotFinite, match=r"model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight holds NaN"):
        [(source.publish(bucket), source.release(bucket)) for bucket in range(buckets)]
    source.finish()

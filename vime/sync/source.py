"""The trainer's side of a weight sync: copies this rank's shards into the buckets of the engines' nodes.

For every bucket a rank writes the boxes it holds directly into its own node's shared memory, and sends those that other
nodes need to their publishers, in one message per bucket and publisher. A publisher copies what it receives into place.
Tensors are quantised before they are written or sent. A bucket for a node without trainer ranks is assembled on its
publisher's node and sent on from there. On GPUs a bucket is in its publisher's GPU memory: a worker on the same GPU
reads it there, an engine node without trainer ranks receives it over NCCL.

One module since the steps of a bucket share its views, its moves and the tensors that wait for quantisation.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vime.checkpoint.hf import HFCheckpoint
from vime.errors import VimeError
from vime.fp8 import quantise as fp8
from vime.models.config import ModelConfig
from vime.models.local import local_tensors
from vime.recipe.parallel import Coordinates, ParallelLayout
from vime.run.plan import Plan
from vime.sync.buffers import Buffers, Views, barrier, entry_views
from vime.sync.channel import CPU, Channel, Listener
from vime.sync.digest import trainer_digests
from vime.sync.parts import BUFFERS, Entry, FarGroup, Move
from vime.sync.schedule import Schedule, schedule_of
from vime.sync.wire import message_bytes, message_parts, scale_box


@dataclass
class Quantising:
    """A box of weights to be quantised, and the targets of its codes and scales."""

    entry: Entry
    box: Tensor
    q: Tensor
    """float8_e4m3fn, of the box's shape."""
    scales: Tensor
    """fp32, one per block of the box."""


@dataclass
class Exchange:
    """One bucket's messages in flight."""

    under_way: list[Any]
    packed: dict[int, Tensor]
    """Outgoing messages by destination rank."""
    receives: dict[int, list[Move]]
    arrived: dict[int, Tensor]
    """Incoming messages by source rank."""


class Copies:
    """Collects copies, so that a GPU makes them in few launches."""

    def __init__(self) -> None:
        self._targets: dict[tuple[torch.dtype, torch.dtype], list[Tensor]] = {}
        self._sources: dict[tuple[torch.dtype, torch.dtype], list[Tensor]] = {}

    def add(self, target: Tensor, source: Tensor) -> None:
        if target.dtype == source.dtype == torch.float8_e4m3fn:
            target, source = target.view(torch.uint8), source.view(torch.uint8)
        key = (target.dtype, source.dtype)
        self._targets.setdefault(key, []).append(target)
        self._sources.setdefault(key, []).append(source)

    def run(self) -> None:
        for key, targets in self._targets.items():
            torch._foreach_copy_(targets, self._sources[key])


class WeightSource:
    """One rank's part of every weight sync. All ranks call the same methods at the same time, in this order:
    `prepare`, then for every bucket `publish` and later `release`, then `finish`.

    Release bucket b before publishing bucket b + 2.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        schedule: Schedule,
        rank: int,
        run: str,
        checkpoint: HFCheckpoint | None = None,
    ) -> None:
        """`tensors`: this rank's shards by name of the global parameter; `run`: the run folder; `checkpoint`: source of
        frozen tensors."""
        self.schedule, self.rank = schedule, rank
        self._tensors, self._checkpoint = tensors, checkpoint
        self._device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
        # The order of moves is the same on every rank; each rank keeps the moves that it sends or publishes.
        self._moves = [
            [
                move
                for move in schedule.moves(bucket.index)
                if rank in (move.source, self._publisher(move, bucket.index))
            ]
            for bucket in schedule.buckets
        ]
        self._buffers = Buffers(schedule, rank, run, self._device)
        self._pending: set[int] = set()
        self._listeners: dict[tuple[int, int], tuple[Listener, int]] = {}
        self._channels: dict[tuple[int, int], Channel] = {}
        self._sending: dict[int, list[Future[None]]] = {}
        # One thread, because the messages of a group must be sent in the order of the buckets.
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="weights")
        # Low priority: sending needs many short turns on the CPU, and would wait for quantising at each of them.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="weights-work", initializer=_give_way)
        self.version = -1
        """Version of the weights of the current sync."""
        self._failure: fp8.WeightNotFinite | None = None
        self._launched: list[tuple[Tensor, list[str]]] = []
        """NaN flags (1: NaN or infinity) and tensor names of this bucket's kernel launches."""
        self.bytes_sent = 0
        """Bytes sent to other ranks since `prepare`."""

    # Engines on nodes without trainer ranks

    def listen(self, groups: Sequence[FarGroup]) -> dict[str, int]:
        """Open a port for every group that this rank publishes to; returns `receiver/engine` to port."""
        for group in groups:
            if self.rank in self.schedule.receivers[group.receiver].publishers:
                key = (group.receiver, group.engine)
                self._channels.pop(key, None)
                self._listeners[key] = (Listener(group.address, group.key), group.workers)
        return {f"{receiver}/{engine}": listener.port for (receiver, engine), (listener, _) in self._listeners.items()}

    def connect(self, timeout_s: float) -> None:
        """Wait until the workers of every group opened by `listen` have joined. Raises DeadlineExceeded."""
        for key, (listener, workers) in self._listeners.items():
            device = self._device if self.schedule.receivers[key[0]].on_gpu else CPU
            self._channels[key] = listener.accept(workers, timeout_s, device)
        self._listeners.clear()

    # The four calls of a sync

    def prepare(self, version: int) -> int:
        """Allocate the buffers; returns the number of buckets, equal on every rank."""
        self.finish()
        self.version, self.bytes_sent = version, 0
        self._buffers.prepare()
        return len(self.schedule.buckets)

    def publish(self, bucket: int) -> dict[str, Any]:
        """Transfer a bucket to the engines' nodes.

        Returns receiver index (as text) to the information its engines need to find the bucket; empty on ranks that
        publish nothing. The bucket is complete when all ranks have returned. Raises WeightNotFinite, but only after
        the other ranks have received what they wait for.
        """
        if self._pending and bucket - min(self._pending) >= BUFFERS:
            raise VimeError(f"bucket {bucket} is published before bucket {min(self._pending)} was released")
        self._pending.add(bucket)
        far = not all(receiver.local for receiver in self.schedule.receivers)
        if far and self._device.type == "cpu":
            self._worker.submit(self._fill, bucket).result()
        else:
            self._fill(bucket)
        if far:
            barrier()
            self._send_far(bucket)
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return {
            str(number): self._update_info(bucket, number)
            for number, receiver in enumerate(self.schedule.receivers)
            if receiver.publisher(bucket) == self.rank
        }

    def _fill(self, bucket: int) -> None:
        """Write this rank's part of the bucket into the receivers' buffers."""
        moves = self._moves[bucket]
        views: Views = {
            number: self._buffers.views(bucket, number)
            for number in {move.receiver for move in moves if self._reaches(move, bucket)}
        }
        with torch.no_grad():
            exchange = self._start_exchange(bucket, moves)
            self._write_local(views, moves)
            self._finish_exchange(views, exchange)
            self._write_frozen(bucket)
        self._look_for_nan()
        if self._device.type == "cuda":
            # Engines read in another process and another thread sends: neither is ordered after this CUDA stream.
            torch.cuda.synchronize(self._device)

    def release(self, bucket: int) -> None:
        """Free a bucket's buffer for another bucket, once the engines have loaded it."""
        for sending in self._sending.pop(bucket, ()):
            sending.result()
        self._pending.discard(bucket)

    def finish(self) -> None:
        """Free the buffers; also called after a failed sync."""
        self._buffers.finish()
        self._pending.clear()
        self._launched, self._failure = [], None
        if any(not sending.done() for mine in self._sending.values() for sending in mine):
            # A failed sync left a message that nobody receives: abandon it, it ends at the group's own deadline.
            self._channels.clear()
            self._buffers.forget()
            self._sender.shutdown(wait=False, cancel_futures=True)
            self._sender = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._sending.clear()

    def digests(self) -> dict[str, str]:
        """HF name to expected digest of the tensors assigned to this rank, to check a sync."""
        return trainer_digests(self.schedule, self.rank, self._tensors, self._checkpoint)

    # Moving

    def _publisher(self, move: Move, bucket: int) -> int:
        return self.schedule.receivers[move.receiver].publisher(bucket)

    def _writes_itself(self, move: Move) -> bool:
        """True if the source itself writes to the receiver's buffer; blocks that cross shards need the publisher."""
        if not move.on_shard:
            return False
        receiver = self.schedule.receivers[move.receiver]
        if receiver.on_gpu:
            return move.source in receiver.publishers
        return self.schedule.nodes[move.source] == self.schedule.home(move.receiver)

    def _reaches(self, move: Move, bucket: int) -> bool:
        """True if this rank writes to the receiver's buffer for the move."""
        return self._publisher(move, bucket) == self.rank or (move.source == self.rank and self._writes_itself(move))

    def _box(self, move: Move) -> Tensor:
        return self._tensors[move.entry.param.name].detach()[move.piece.target]

    def _write_local(self, views: Views, moves: list[Move]) -> None:
        copies, waiting = Copies(), []
        for move in moves:
            if move.source != self.rank or not self._writes_itself(move):
                continue
            whole, scales = views[move.receiver][move.entry.name]
            target = whole[move.piece.source]
            if scales is None:
                copies.add(target, self._box(move))
            else:
                box = scales[scale_box(move, self.schedule.block)]
                waiting.append(Quantising(move.entry, self._box(move), target, box))
        copies.run()
        self._quantise(waiting)

    def _quantise(self, waiting: Sequence[Quantising]) -> None:
        config = self.schedule.config.quantisation
        if not waiting or config is None:
            return
        try:
            if self._device.type == "cuda" and config.block[0] == config.block[1] and config.scale_format == "float32":
                self._launched += _quantise_at_once(waiting, config.block[0])
                return
            for one in waiting:
                form = {"scale_format": config.scale_format, "name": one.entry.name}
                one.scales.copy_(fp8.quantise(one.box, config.block, **form, out=one.q)[1])
        except fp8.WeightNotFinite as error:
            self._failure = self._failure or error

    def _look_for_nan(self) -> None:
        """Fetch the kernels' NaN flags in one transfer, and record the first failure."""
        launched, self._launched = self._launched, []
        if not launched:
            return
        names = [name for _, mine in launched for name in mine]
        wrong = torch.cat([flags for flags, _ in launched]).nonzero().flatten().tolist()
        if wrong and self._failure is None:
            self._failure = fp8.WeightNotFinite(f"{names[wrong[0]]} holds NaN or infinity")

    def _start_exchange(self, bucket: int, moves: list[Move]) -> Exchange:
        """Start one message per pair of ranks, with all boxes from one to the other in the schedule's order."""
        sends: dict[int, list[Move]] = {}
        receives: dict[int, list[Move]] = {}
        for move in moves:
            if self._writes_itself(move):
                continue
            publisher = self._publisher(move, bucket)
            if move.source == self.rank:
                sends.setdefault(publisher, []).append(move)
            if publisher == self.rank:
                receives.setdefault(move.source, []).append(move)
        arrived = {self.rank: self._pack(sends.pop(self.rank))} if self.rank in sends else {}
        packed = {rank: self._pack(mine) for rank, mine in sends.items()}
        for rank, theirs in receives.items():
            if rank != self.rank:
                arrived[rank] = self._message(theirs)
        requests = [dist.P2POp(dist.isend, data, rank) for rank, data in packed.items()]
        requests += [dist.P2POp(dist.irecv, data, rank) for rank, data in arrived.items() if rank != self.rank]
        self.bytes_sent += sum(data.numel() for data in packed.values())
        # Keep the packed messages alive until they have arrived.
        return Exchange(dist.batch_isend_irecv(requests) if requests else [], packed, receives, arrived)

    def _finish_exchange(self, views: Views, exchange: Exchange) -> None:
        for work in exchange.under_way:
            work.wait()
        self._unpack(views, exchange.receives, exchange.arrived)

    def _message(self, moves: Sequence[Move]) -> Tensor:
        size = message_bytes(moves, self.schedule.block)
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _pack(self, moves: list[Move]) -> Tensor:
        """A message as uint8. Boxes whose blocks cross shards are sent in fp32, so nothing is rounded twice."""
        message = self._message(moves)
        copies, waiting = Copies(), []
        for move, (numbers, scales) in zip(moves, message_parts(message, moves, self.schedule.block), strict=True):
            if scales is None:
                copies.add(numbers, self._box(move))
            else:
                waiting.append(Quantising(move.entry, self._box(move), numbers, scales))
        copies.run()
        self._quantise(waiting)
        return message

    def _unpack(self, views: Views, receives: dict[int, list[Move]], arrived: dict[int, Tensor]) -> None:
        whole: dict[tuple[int, str], tuple[Entry, Tensor]] = {}
        copies, block = Copies(), self.schedule.block
        for rank, moves in receives.items():
            for move, (numbers, scales) in zip(moves, message_parts(arrived[rank], moves, block), strict=True):
                target, target_scales = views[move.receiver][move.entry.name]
                if move.entry.quantised and not move.on_shard:
                    key = (move.receiver, move.entry.name)
                    if key not in whole:
                        whole[key] = (move.entry, torch.empty(move.entry.shape, device=self._device))
                    copies.add(whole[key][1][move.piece.source], numbers)
                    continue
                copies.add(target[move.piece.source], numbers)
                if scales is not None:
                    assert target_scales is not None
                    copies.add(target_scales[scale_box(move, block)], scales)
        copies.run()
        waiting: list[Quantising] = []
        for (receiver, name), (entry, matrix) in whole.items():
            target, scales = views[receiver][name]
            assert scales is not None
            waiting.append(Quantising(entry, matrix, target, scales))
        self._quantise(waiting)

    def _write_frozen(self, bucket: int) -> None:
        """Copy frozen tensors, as stored, from the checkpoint to the buffers that this rank publishes."""
        for number, receiver in enumerate(self.schedule.receivers):
            if receiver.publisher(bucket) != self.rank:
                continue
            slices, _ = self.schedule.slices(bucket, number)
            data = self._buffers.of(bucket, number).data
            for entry_slice in slices:
                if entry_slice.entry.frozen:
                    self._copy_stored(entry_slice.entry, entry_views(data, entry_slice, self.schedule.block))

    def _copy_stored(self, entry: Entry, views: tuple[Tensor, Tensor | None]) -> None:
        if self._checkpoint is None:
            raise VimeError(f"{entry.name} is frozen, but there is no HF checkpoint to take it from")
        target, scales = views
        if scales is None:
            target.copy_(self._checkpoint.tensor(entry.name))
        elif self._checkpoint.is_quantised(entry.name):
            target.view(torch.uint8).copy_(self._checkpoint.stored(entry.name).view(torch.uint8))
            scales.copy_(self._checkpoint.scale(entry.name))
        else:
            stored = self._checkpoint.tensor(entry.name).to(self._device)
            self._quantise([Quantising(entry, stored, target, scales)])

    def _send_far(self, bucket: int) -> None:
        """Start sending the bucket to far nodes. Engines receive it in their update call; `release` waits for that."""
        for (number, _), channel in self._channels.items():
            if self.schedule.receivers[number].publisher(bucket) == self.rank:
                data = self._buffers.of(bucket, number).data[: self.schedule.slices(bucket, number)[1]]
                self._sending.setdefault(bucket, []).append(self._sender.submit(channel.move, data))

    def _update_info(self, bucket: int, number: int) -> dict[str, Any]:
        slices, size = self.schedule.slices(bucket, number)
        buffer = self._buffers.of(bucket, number)
        local = buffer.segment is not None and self.schedule.receivers[number].local
        return {
            "segment": buffer.segment.name if buffer.segment and local else None,
            "handle": buffer.handle,
            "last": bucket == len(self.schedule.buckets) - 1,
            "size": size,
            "block": list(self.schedule.block),
            "tensors": [
                [entry.name, entry.dtype, list(entry.shape), entry_slice.offset, entry_slice.scale_offset]
                for entry_slice in slices
                for entry in (entry_slice.entry,)
            ],
        }


def _quantise_at_once(waiting: Sequence[Quantising], block: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Quantise on a GPU, one launch per type. Yields a flag per box (1: NaN or infinity), and the boxes' names."""
    from vime.fp8.gpu_kernels import block_table, launch_quantise

    for dtype in {one.box.dtype for one in waiting}:
        mine = [one for one in waiting if one.box.dtype == dtype]
        boxes = [one.box.contiguous() for one in mine]
        codes = [one.q.contiguous() for one in mine]
        scales = [one.scales.contiguous() for one in mine]
        table = block_table(boxes, codes, scales, block)
        launch_quantise(table, dtype, block)
        for one, code, scale in zip(mine, codes, scales, strict=True):
            if code is not one.q:
                one.q.copy_(code)
            if scale is not one.scales:
                one.scales.copy_(scale)
        yield table.wrong, [one.entry.name for one in mine]


def model_source(
    chunks: Sequence[torch.nn.Module],
    config: ModelConfig,
    layout: ParallelLayout,
    coords: Coordinates,
    plan: Plan,
    rank: int,
) -> WeightSource:
    """Build the weight source of a rank's model chunks for the plan's schedule."""
    tensors = {local.param.name: local.tensor for local in local_tensors(chunks, config, layout, coords)}
    schedule, checkpoint = schedule_of(plan), plan.recipe.checkpoint.hf_checkpoint
    frozen = any(entry.frozen for bucket in schedule.buckets for entry in bucket.entries)
    stored = HFCheckpoint(checkpoint) if frozen and checkpoint else None
    return WeightSource(tensors, schedule, rank, plan.run_dir, stored)


def _give_way() -> None:
    """Lower the priority of the calling thread and of the threads it starts."""
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + 10)

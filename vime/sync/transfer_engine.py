"""The engine's side of a weight sync: loads buckets into vLLM's model, from host or GPU memory shared with the trainer
or from a process group.

Tensors arrive under their HF names, quantised ones as e4m3 with scales. An engine that holds block fp8 loads them
unchanged; any other (every engine on a CPU) loads them dequantised to its own type.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from vime.errors import VimeError
from vime.fp8 import quantise as fp8
from vime.sync.channel import Channel, Door
from vime.sync.cuda_memory import map_shared
from vime.sync.fingerprint import fingerprint
from vime.sync.segment import Segment


class IncompleteUpdate(VimeError):
    """An update ended before every layer of the model got its weights."""


@dataclass
class TransferInit(WeightTransferInitInfo):
    """Transport of buckets: workers in one of the groups receive from it, all others read shared memory."""

    groups: list[dict[str, Any]]
    """For each group: `address` and `port` of the publisher, `first_worker`, number of `workers`."""
    timeout_s: float


@dataclass
class BucketInfo(WeightTransferUpdateInfo):
    """One bucket, as `WeightSource.publish` describes it."""

    segment: str | None
    size: int
    block: list[int]
    tensors: list[list[Any]]
    """[name, dtype, shape, offset, offset of the scales or None] of each tensor, offsets in bytes."""
    handle: list[Any] | None = None
    """CUDA handle of the bucket's memory on this worker's GPU."""
    last: bool = False
    """True for the last bucket of a sync."""
    digest: bool = False
    """True to keep the tensors' digests in `TransferEngine.received`, to check the sync."""


class TransferEngine(WeightTransferEngine[TransferInit, BucketInfo]):
    """vime's weight-transfer engine in each worker of an engine."""

    init_info_cls = TransferInit
    update_info_cls = BucketInfo
    _channel: Channel | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.received: dict[str, str] = {}
        """HF name to digest, until reported with the weights' checksums."""
        self._mapped: dict[str, torch.Tensor] = {}
        self._updating = False

    def init_transfer_engine(self, init_info: TransferInit) -> None:
        """Join the process group of this worker's node, if it has one.

        Raises VimeError if the trainer before this one left an update unfinished: the engine must be started again.
        """
        if self._updating:
            raise VimeError("a trainer that is gone left an update of the weights unfinished")
        self._mapped.clear()
        self.received.clear()
        worker = self.parallel_config.data_parallel_index * self.parallel_config.world_size + self.parallel_config.rank
        self._channel = None
        for group in init_info.groups:
            rank = 1 + worker - group["first_worker"]
            if 1 <= rank <= group["workers"]:
                door = Door(group["address"], group["port"], group["key"])
                device = torch.device(self.device)
                self._channel = Channel(door, rank, 1 + group["workers"], init_info.timeout_s, device)

    def start_weight_update(self) -> None:
        self._updating = True
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        missing, shared = unloaded_layers(self.model)
        finalize_layerwise_reload(self.model, self.model_config)
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise IncompleteUpdate(f"the update brought no weights for {', '.join(missing[:5])}{more}")
        self._updating = False
        if self.device.type == "cpu":
            for name in shared:
                _pack_again(self.model.get_submodule(name))

    def receive_weights(self, update_info: BucketInfo) -> None:
        data = self._bytes_of(update_info)
        model: Any = self.model
        with disable_mtp_completeness_check():
            model.load_weights(self._tensors(data, update_info))
        if data.is_cuda:
            # After this call returns, the trainer or the next call overwrites this memory.
            torch.cuda.synchronize()
        if update_info.last:
            self._mapped.clear()

    def shutdown(self) -> None:
        self._channel = None
        self._mapped.clear()

    def _bytes_of(self, bucket: BucketInfo) -> torch.Tensor:
        if bucket.handle is not None:
            key = json.dumps(bucket.handle)
            if key not in self._mapped:
                self._mapped[key] = map_shared(bucket.handle)
            return self._mapped[key]
        if self._channel is not None:
            data = torch.empty(bucket.size, dtype=torch.uint8, device=self.device)
            self._channel.move(data)
            return data
        if bucket.segment is None:
            raise VimeError("this bucket is in no shared memory of this node, and this worker is in no group")
        memory = Segment.open(bucket.segment).memory
        if len(memory) < bucket.size:
            raise VimeError(f"segment {bucket.segment} has {len(memory)} bytes, the bucket {bucket.size}")
        return torch.frombuffer(memory, dtype=torch.uint8)

    @property
    def _takes_fp8(self) -> bool:
        return self.model_config.quantization == "fp8"

    def _tensors(self, data: torch.Tensor, bucket: BucketInfo) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) pairs; none is a view of `data`, because vLLM keeps tensors until their layer is complete."""
        block = (bucket.block[0], bucket.block[1])
        for name, dtype, shape, offset, scale_offset in bucket.tensors:
            kind = getattr(torch, dtype)
            raw = data[offset : offset + math.prod(shape) * kind.itemsize]
            tensor = raw.view(kind).view(shape)
            scale = None
            if scale_offset is not None:
                wide = fp8.scale_shape(shape, block)
                scale = data[scale_offset : scale_offset + 4 * math.prod(wide)].view(torch.float32).view(wide)
            if bucket.digest:
                self.received[name] = fingerprint(tensor, scale)
            if scale is None:
                yield name, tensor.to(self.device, copy=True)
            elif self._takes_fp8:
                yield name, tensor.to(self.device, copy=True)
                yield fp8.scale_name(name), scale.to(self.device, copy=True)
            else:
                yield name, fp8.dequantise(tensor, scale, block, dtype=self.model_config.dtype).to(self.device)


def unloaded_layers(model: torch.nn.Module) -> tuple[list[str], list[str]]:
    """Layers that got no weight since the update began: those with parameters of their own, and those whose parameters
    are shared with a layer that got them (a tied output head)."""
    missing: dict[str, set[int]] = {}
    loaded: set[int] = set()
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        kept = layer._parameters if info.kernel_tensors is None else info.kernel_tensors[0]
        memory = {parameter.data_ptr() for parameter in kept.values() if parameter is not None}
        waiting = info.can_load() and (info.load_numel_total or 0) > 0 and info.load_numel <= 0
        if waiting and memory and not is_deferred_attention_layer(layer):
            missing[name] = memory
        else:
            loaded |= memory
    shared = [name for name, memory in missing.items() if memory <= loaded]
    return [name for name in missing if name not in shared], shared


def _pack_again(layer: Any) -> None:
    """Pack a linear layer's weight again. On a CPU it computes with a packed copy, which vLLM refreshes only for loaded
    layers: a tied output head would keep using the old embedding."""
    layer.quant_method.process_weights_after_loading(layer)

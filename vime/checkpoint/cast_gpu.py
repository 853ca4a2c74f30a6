"""Dequantisation of block-fp8 rows on a GPU, between pinned buffers; the cast uses it if a GPU is present.

Each thread has its own stream and buffers and works on one piece at a time. With as many threads as cores, the reads,
both directions of PCIe, the kernel and the writes of different pieces overlap.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vime.checkpoint.hf import HFCheckpoint
from vime.checkpoint.safetensors_file import TensorInfo, raw_bytes
from vime.errors import BadInput
from vime.fp8.gpu_kernels import BlockTable, block_table, launch_dequantise

PIECE_BYTES = 32 * 2**20
"""Output bytes per piece; a routed expert's matrix of DeepSeek-V3 fits."""


@dataclass
class _Lane:
    """One thread's stream and buffers; tables are kept by shape, since the addresses in them stay the same."""

    stream: torch.cuda.Stream
    host_in: torch.Tensor
    host_out: torch.Tensor
    device_in: torch.Tensor
    device_out: torch.Tensor
    scales: torch.Tensor
    tables: dict[tuple[int, ...], BlockTable] = field(default_factory=dict)


class GpuCaster:
    """Reads rows of a tensor's file and returns their bf16 values in pinned memory."""

    piece_bytes = PIECE_BYTES
    shards_at_once = None
    """As many as threads, because pages are added to a file under its lock."""

    def __init__(self, checkpoint: HFCheckpoint, device: torch.device) -> None:
        if checkpoint.block[0] != checkpoint.block[1]:
            raise BadInput(f"{checkpoint.path} has blocks of {checkpoint.block}: only square ones go through a GPU")
        self.checkpoint, self._device = checkpoint, device
        self._local = threading.local()
        self._lock = threading.Lock()
        self._files: dict[Path, int] = {}

    def rows(self, info: TensorInfo, first: int, last: int, scales: torch.Tensor) -> torch.Tensor:
        """bf16 [last - first, columns], valid until this thread's next call; `scales` are those of the rows' blocks."""
        block = self.checkpoint.block[0]
        shape = (last - first, info.shape[1])
        count = shape[0] * shape[1]
        lane = self._lane(count, scales.numel())
        self._read(info, first * shape[1], lane.host_in[:count])
        with torch.cuda.stream(lane.stream):
            lane.device_in[:count].copy_(lane.host_in[:count], non_blocking=True)
            lane.scales[: scales.numel()].copy_(scales.float().flatten(), non_blocking=True)
            launch_dequantise(self._table(lane, shape, scales.shape, block), torch.bfloat16, block)
            lane.host_out[:count].copy_(lane.device_out[:count], non_blocking=True)
        lane.stream.synchronize()
        return lane.host_out[:count].view(shape)

    def close(self) -> None:
        """Close the files that were read."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _lane(self, elements: int, scales: int) -> _Lane:
        """This thread's lane, enlarged if a piece needs it."""
        lane: _Lane | None = getattr(self._local, "lane", None)
        if lane is not None and lane.host_in.numel() >= elements and lane.scales.numel() >= scales:
            return lane
        elements = max(elements, PIECE_BYTES // 2)
        fp8, bf16 = torch.float8_e4m3fn, torch.bfloat16
        lane = _Lane(
            stream=torch.cuda.Stream(self._device),
            host_in=torch.empty(elements, dtype=torch.uint8).pin_memory().view(fp8),
            host_out=torch.empty(elements, dtype=bf16).pin_memory(),
            device_in=torch.empty(elements, dtype=fp8, device=self._device),
            device_out=torch.empty(elements, dtype=bf16, device=self._device),
            scales=torch.empty(max(scales, 2**16), dtype=torch.float32, device=self._device),
        )
        # The buffers were made on the default stream.
        torch.cuda.current_stream(self._device).synchronize()
        self._local.lane = lane
        return lane

    def _table(self, lane: _Lane, shape: tuple[int, int], scales: tuple[int, ...], block: int) -> BlockTable:
        found = lane.tables.get(shape)
        if found is None:
            count = shape[0] * shape[1]
            found = block_table(
                [lane.device_in[:count].view(shape)],
                [lane.device_out[:count].view(shape)],
                [lane.scales[: scales[0] * scales[1]].view(scales)],
                block,
            )
            lane.tables[shape] = found
        return found

    def _read(self, info: TensorInfo, offset: int, into: torch.Tensor) -> None:
        """Read through a descriptor: a mapping would cost a page fault every 4 KiB."""
        with self._lock:
            if info.file not in self._files:
                self._files[info.file] = os.open(info.file, os.O_RDONLY | os.O_CLOEXEC)
            file = self._files[info.file]
        buffer = raw_bytes(into)
        done = 0
        while done < len(buffer):
            count = os.preadv(file, [buffer[done:]], info.begin + offset + done)
            if count == 0:
                raise OSError(5, "the file ends before its tensor", str(info.file))
            done += count

"""Buckets between nodes without GPUs: one gloo group of a publisher and the engine workers of one node.

The store and every connection are bound to the nodes' own addresses.
"""

from __future__ import annotations

import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from vime.errors import DeadlineExceeded, VimeError


class Listener:
    """The publisher's end before the workers have come: a bound port."""

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.address = address
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.bind((address, 0))
        self._socket.listen()
        self.port: int = self._socket.getsockname()[1]

    def accept(self, workers: int, timeout_s: float) -> Channel:
        """The group, once all workers have joined. Raises DeadlineExceeded."""
        return Channel(self.address, self.port, 0, workers + 1, timeout_s, listener=self._socket.detach())


class Channel:
    """A member of a group; rank 0 sends, all others receive."""

    def __init__(
        self, address: str, port: int, rank: int, size: int, timeout_s: float, listener: int | None = None
    ) -> None:
        timeout = timedelta(seconds=timeout_s)
        own = address if rank == 0 else _own_address(address, port)
        try:
            self._store = dist.TCPStore(
                address, port, size, rank == 0, timeout=timeout, wait_for_workers=False, master_listen_fd=listener
            )
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=own)]
            options._timeout = timeout
            self._group = dist.ProcessGroupGloo(dist.PrefixStore("weights", self._store), rank, size, options)
        except RuntimeError as error:
            raise DeadlineExceeded(
                f"the {size} members of the weight group at {address}:{port} did not all join within {timeout_s:.0f} s"
            ) from error

    def move(self, data: torch.Tensor) -> None:
        """Send a CPU tensor of bytes (rank 0), or fill it with what is sent. Raises VimeError when a member is gone."""
        try:
            self._group.broadcast(data, 0).wait()
        except RuntimeError as error:
            raise VimeError(f"the weight group broke: {str(error).splitlines()[0]}") from error


def _own_address(address: str, port: int) -> str:
    """The address of this node from which the other one is reached; asks the routing table, sends nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))
        return probe.getsockname()[0]

"""Bucket transport between nodes: a process group of a publisher and one node's engine workers, gloo for host memory
and NCCL for GPU memory.

The store asks for the group's key, and gloo's connections are bound to the nodes' own addresses; NCCL takes its
interface from NCCL_SOCKET_IFNAME.
"""

from __future__ import annotations

import socket
import threading
import time
import weakref
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from vime.errors import DeadlineExceeded, VimeError
from vime.system.guarded_store import GuardedStore
from vime.system.store_server import StoreServer, listen

CPU = torch.device("cpu")
POLL_SECONDS = 0.0002
ABORT_SECONDS = 10.0


@dataclass(frozen=True)
class Door:
    """Where a group meets, and the key that it asks for."""

    address: str
    port: int
    key: str


class Listener:
    """The publisher's end before the workers join: a bound port that asks for the group's key."""

    def __init__(self, address: str, key: str) -> None:
        self._socket = listen(address, 0)
        self.door = Door(address, self._socket.getsockname()[1], key)

    @property
    def port(self) -> int:
        return self.door.port

    def accept(self, workers: int, timeout_s: float, device: torch.device = CPU) -> Channel:
        """Wait until all workers have joined; the group for tensors on `device`. Raises DeadlineExceeded."""
        return Channel(
            self.door, 0, workers + 1, timeout_s, device, server=StoreServer(self._socket, _octets(self.door))
        )


class Channel:
    """A member of a group; rank 0 sends, all others receive."""

    def __init__(
        self,
        door: Door,
        rank: int,
        size: int,
        timeout_s: float,
        device: torch.device = CPU,
        *,
        server: StoreServer | None = None,
    ) -> None:
        self._device, self._timeout = device, timedelta(seconds=timeout_s)
        address, port = door.address, door.port
        try:
            # Kept: torch's group holds the part of it that is C++ alone.
            self._store = GuardedStore(address, port, _octets(door), self._timeout, server=server)
            weakref.finalize(self, self._store.close)
            store = dist.PrefixStore("weights", self._store)
            if device.type == "cuda":
                self._group = self._nccl(store, rank, size)
            else:
                self._group = self._gloo(store, rank, size, address if rank == 0 else _own_address(address, port))
        except RuntimeError as error:
            if server is not None:
                server.close()
            raise DeadlineExceeded(
                f"the {size} members of the weight group at {address}:{port} did not all join within {timeout_s:.0f} s"
            ) from error

    def _gloo(self, store: dist.Store, rank: int, size: int, address: str) -> Any:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = self._timeout
        return dist.ProcessGroupGloo(store, rank, size, options)

    def _nccl(self, store: dist.Store, rank: int, size: int) -> Any:
        torch.cuda.set_device(self._device)
        options = dist.ProcessGroupNCCL.Options()
        # At the group's own timeout torch's watchdog ends the process; `_finish` aborts the group earlier.
        options._timeout = 4 * self._timeout + timedelta(minutes=10)
        group = dist.ProcessGroupNCCL(store, rank, size, options)
        # NCCL connects at the first message: this one makes every member wait for all others, as gloo does.
        self._finish(group, group.broadcast(torch.zeros(1, dtype=torch.uint8, device=self._device), 0))
        return group

    def _finish(self, group: Any, work: Any) -> None:
        """Wait for a message over NCCL. Raises RuntimeError at the deadline; the group is unusable afterwards."""
        end = time.monotonic() + self._timeout.total_seconds()
        while not work.is_completed():
            if time.monotonic() > end:
                # The abort may itself wait for other members, hence the thread.
                breaking = threading.Thread(target=group.abort, name="weights-abort", daemon=True)
                breaking.start()
                breaking.join(ABORT_SECONDS)
                raise RuntimeError(f"a message was not delivered within {self._timeout.total_seconds():.0f} s")
            time.sleep(POLL_SECONDS)
        work.wait()

    def move(self, data: torch.Tensor) -> None:
        """Send a uint8 tensor (rank 0) or receive into it (other ranks). On return the data has arrived, or may be
        overwritten by its sender. Raises VimeError when a member is gone."""
        try:
            if self._device.type == "cuda":
                # CUDA's current device is set per thread; this may be the source's sending thread.
                torch.cuda.set_device(self._device)
                self._finish(self._group, self._group.broadcast(data, 0))
            else:
                self._group.broadcast(data, 0).wait(self._timeout)
        except RuntimeError as error:
            raise VimeError(f"the weight group broke: {str(error).splitlines()[0]}") from error


def _octets(door: Door) -> bytes:
    return door.key.encode()


def _own_address(address: str, port: int) -> str:
    """This node's address on the route to `address`, from the routing table; sends nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))
        return probe.getsockname()[0]

"""The key-value store at which the ranks of a process group meet, listening on one address alone.

With a key, as in every stage of a run, it serves only members that know it, and objects that ranks exchange are signed.
Without one it is torch's own, which whoever reaches the address can read and write: for tools started by hand with
torchrun or srun. Needs torch.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from vime.system.guarded_store import GuardedStore
from vime.system.signed_objects import sign_objects
from vime.system.store_server import StoreServer, listen

_alive: list[GuardedStore] = []
"""torch's groups hold the part of a store that is C++ alone: what its methods are goes with the Python object."""


def group_store(
    address: str, port: int, rank: int, world_size: int, timeout: timedelta, key: bytes | None = None
) -> dist.Store:
    """The store for `init_process_group`; rank 0 serves it at `address`. Raises RuntimeError, OSError.

    `key` guards it and the objects that this process sends and receives. Without one, a host name, which may be a
    loopback address on its own host, is left to torch: rank 0 then listens everywhere.
    """
    if key is not None:
        server = StoreServer(listen(address, port), key) if rank == 0 else None
        _alive.append(GuardedStore(address, port, key, timeout, server=server))
        sign_objects(key)
        return dist.PrefixStore("group", _alive[-1])
    serves = rank == 0 and not _agent_serves(os.environ)
    listener = listen(address, port).detach() if serves and _is_address(address) else None
    store = dist.TCPStore(
        address, port, world_size, serves, timeout=timeout, wait_for_workers=False, master_listen_fd=listener
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"group/{attempt}", store)


def _agent_serves(environ: Mapping[str, str]) -> bool:
    """True under torchrun, whose agent serves the store at MASTER_ADDR and MASTER_PORT."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True

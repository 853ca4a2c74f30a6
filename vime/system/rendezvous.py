"""The key-value store at which the ranks of a process group meet, listening on one address alone.

torch's own listens on every interface of the node. It asks nobody for a credential, so whoever reaches the address can
read and write keys; what ranks then exchange goes over connections between themselves. Needs torch.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist


def group_store(address: str, port: int, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store for `init_process_group`; rank 0 serves it at `address`. Raises RuntimeError, OSError.

    A host name, which may be a loopback address on its own host, is left to torch: rank 0 then listens everywhere.
    """
    serves = rank == 0 and not _agent_serves(os.environ)
    listener = _listen(address, port) if serves and _is_address(address) else None
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


def _listen(address: str, port: int) -> int:
    """Descriptor of a socket that listens on the address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=4096).detach()

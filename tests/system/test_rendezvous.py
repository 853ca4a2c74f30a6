"""The store of a process group: ranks meet at one address, and nowhere else is anybody listening."""

from __future__ import annotations

import socket
import subprocess
import sys
from datetime import timedelta

import pytest

from tests.support import patience
from tests.support.single import free_port
from vime.system.rendezvous import group_store

LIMIT = timedelta(seconds=patience.PROCESS)
MEMBER = """
import sys
from datetime import timedelta
import torch.distributed as dist
from vime.system.rendezvous import group_store
rank, port, limit = int(sys.argv[1]), int(sys.argv[2]), timedelta(seconds=60)
dist.init_process_group("gloo", store=group_store("127.0.0.3", port, rank, 2, limit), rank=rank, world_size=2)
found = [None]
dist.broadcast_object_list(found if rank else ["word"], src=0)
dist.barrier()
"""


def listeners(port: int) -> set[str]:
    """Addresses of this machine at which the port takes connections, of those tried."""
    found = set()
    for address in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
        with socket.socket() as probe:
            probe.settimeout(2)
            if probe.connect_ex((address, port)) == 0:
                found.add(address)
    return found


def test_it_listens_on_the_address_of_the_run_alone() -> None:
    port = free_port()
    store = group_store("127.0.0.2", port, 0, 1, LIMIT)
    store.set("key", "value")
    assert store.get("key") == b"value"
    assert listeners(port) == {"127.0.0.2"}


def test_ranks_meet_there() -> None:
    port = free_port()
    ranks = [subprocess.Popen([sys.executable, "-c", MEMBER, str(rank), str(port)]) for rank in range(2)]
    assert [rank.wait(timeout=patience.PROCESS) for rank in ranks] == [0, 0]


def test_under_torchrun_its_agent_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    agent = group_store("127.0.0.1", port, 0, 1, LIMIT)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    member = group_store("127.0.0.1", port, 0, 1, LIMIT)
    member.set("key", "value")
    assert agent.get("key") == b"value"

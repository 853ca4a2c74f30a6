"""What a node tells about its network: addresses, listening ports, RDMA ports."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915
_LISTENING = "0A"


def interfaces() -> dict[str, str]:
    """IPv4 address of every interface that has one, by the interface's name."""
    import fcntl

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has no IPv4 address
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def own_address(others: list[str], wanted_interface: str | None) -> tuple[str, str | None]:
    """(address, interface) at which the other nodes reach this one.

    The interface that is asked for, else the one on the way to another node, else that of the host's own name.
    """
    by_name = interfaces()
    if wanted_interface is not None:
        return by_name.get(wanted_interface, ""), wanted_interface
    addresses = {address: name for name, address in by_name.items()}
    for host in [*others, socket.gethostname()]:
        address = _address_towards(host)
        if address in addresses and not address.startswith("127."):
            return address, addresses[address]
    return "127.0.0.1", addresses.get("127.0.0.1")


def _address_towards(host: str) -> str | None:
    """The local address of a route to a host; nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return probe.getsockname()[0]
    except OSError:
        return None


def listening_ports() -> set[int]:
    """TCP ports on which a process of this node listens."""
    found = set()
    for name in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/net", name).read_text().splitlines()[1:]
        except FileNotFoundError:
            continue
        found |= {int(line.split()[1].rpartition(":")[2], 16) for line in lines if line.split()[3] == _LISTENING}
    return found


def rdma_ports(root: Path = Path("/sys/class/infiniband")) -> dict[str, str]:
    """State of every port of the RDMA devices in the kernel's words, as `{"mlx5_0:1": "ACTIVE"}`."""
    found = {}
    for state in sorted(root.glob("*/ports/*/state")):
        device, _, port = state.parts[-4:-1]
        # `4: ACTIVE`
        found[f"{device}:{port}"] = state.read_text().partition(":")[2].strip()
    return found

"""Facts about a node's network: addresses, listening ports, RDMA ports."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915
_LISTENING = "0A"
_OUTSIDE = "192.0.2.1"
"""An address of no network (RFC 5737); nothing is sent there."""
_VIRTUAL = ("docker", "br-", "virbr", "veth", "cni", "flannel", "podman", "lxc", "tun", "tap")
"""Beginnings of names of interfaces that other nodes do not reach."""
ALONE_ADDRESS = "127.0.0.2"
"""Loopback for a run on one machine. Ray puts the machine's outer address in place of 127.0.0.1."""


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

    The requested interface, else the one on the route to another node, to the host's own name, or out of the network.
    """
    by_name = interfaces()
    if wanted_interface is not None:
        return by_name.get(wanted_interface, ""), wanted_interface
    addresses = {address: name for name, address in by_name.items()}
    # The host's own name may be a loopback address (127.0.1.1 on Debian): then the way out of this network counts.
    for host in [*others, socket.gethostname(), _OUTSIDE]:
        address = _address_towards(host)
        if address in addresses and not address.startswith("127."):
            return address, addresses[address]
    real = [name for name in by_name if not by_name[name].startswith("127.") and not name.startswith(_VIRTUAL)]
    if real:
        return by_name[real[0]], real[0]
    return ALONE_ADDRESS, addresses.get("127.0.0.1")


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

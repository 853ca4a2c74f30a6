"""The address at which the other nodes reach this one."""

from __future__ import annotations

import pytest

from vime.node import network

ROUTES = {"node02": "10.1.0.1", "192.0.2.1": "10.2.0.1", "10.9.9.9": "127.0.0.1"}
INTERFACES = {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": "10.2.0.1", "ib0": "10.1.0.1"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A node of Debian, whose own name is 127.0.1.1."""

    def make(interfaces: dict[str, str], routes: dict[str, str]) -> None:
        monkeypatch.setattr(network, "interfaces", lambda: interfaces)
        monkeypatch.setattr(network, "_address_towards", lambda host: routes.get(host, "127.0.0.1"))

    return make


@pytest.mark.parametrize(
    ("others", "wanted", "routes", "found"),
    [
        (["node02"], None, ROUTES, ("10.1.0.1", "ib0")),
        (["node02"], "eth0", ROUTES, ("10.2.0.1", "eth0")),
        (["node02"], "ib7", ROUTES, ("", "ib7")),
        ([], None, ROUTES, ("10.2.0.1", "eth0")),
        # Without a route out of its network: the first interface that is not of containers.
        ([], None, {}, ("10.2.0.1", "eth0")),
    ],
)
def test_an_address_of_an_interface_is_found(
    machine, others: list, wanted: str | None, routes: dict, found: tuple
) -> None:
    machine(INTERFACES, routes)
    assert network.own_address(others, wanted) == found


def test_a_machine_without_a_network_has_an_address_that_ray_leaves_alone(machine) -> None:
    machine({"lo": "127.0.0.1", "docker0": "172.17.0.1"}, {})
    assert network.own_address([], None) == ("127.0.0.2", "lo")

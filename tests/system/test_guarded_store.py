"""The store at which a run's ranks meet: it does what torch's does, for members of the group alone."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support import patience
from tests.support.single import free_port
from vime.system.guarded_store import GuardedStore
from vime.system.handshake import CLIENT, SERVER, Refused, Session
from vime.system.signed_objects import UnsignedObject, leave_objects_unsigned, sign_objects
from vime.system.store_server import StoreServer, listen

KEY = b"of this run"
LIMIT = timedelta(seconds=patience.PROCESS)


@contextlib.contextmanager
def served() -> Iterator[tuple[GuardedStore, int]]:
    """A store of one member, and its port."""
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    store = GuardedStore("127.0.0.1", port, KEY, LIMIT, server=StoreServer(listener, KEY))
    try:
        yield store, port
    finally:
        store.close()


def test_it_answers_as_torch_s_store_does() -> None:
    """The same calls, through the prefix that a process group adds, to this store and to torch's in memory."""
    with served() as (guarded, _):
        answers = []
        for store in (dist.PrefixStore("g", guarded), dist.PrefixStore("g", dist.HashStore())):
            store.set("a", "one")
            store.set("b", b"\x00\xff")
            store.append("a", "+")
            answers.append(
                [
                    store.get("a"),
                    store.get("b"),
                    store.add("n", 3),
                    store.add("n", -1),
                    store.get("n"),
                    store.compare_set("c", "", "first"),
                    store.compare_set("c", "other", "second"),
                    store.compare_set("c", "first", "third"),
                    store.check(["a", "c"]),
                    store.check(["a", "absent"]),
                    store.delete_key("b"),
                    store.delete_key("b"),
                    store.num_keys(),
                    store.wait(["a", "c"]),
                    store.multi_get(["a", "c"]),
                ]
            )
    assert answers[0] == answers[1]


def test_a_reader_waits_for_the_writer() -> None:
    with served() as (store, _):
        threading.Timer(0.3, store.set, ("late", "here")).start()
        assert store.get("late") == b"here"


def test_a_wait_ends_at_its_limit_and_names_the_keys() -> None:
    with served() as (store, _), pytest.raises(dist.DistStoreError, match="nobody has set: rank3"):
        store.wait(["rank3"], timedelta(seconds=0.2))


def test_another_key_is_refused_on_both_sides() -> None:
    with served() as (_, port), pytest.raises(dist.DistStoreError, match="another key"):
        GuardedStore("127.0.0.1", port, b"of another run", LIMIT)


def test_a_silent_stranger_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vime.system.store_server.CHALLENGE_S", 0.3)
    with served() as (store, port), contextlib.ExitStack() as stack:
        strangers = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=patience.MOMENT))
            for _ in range(200)
        ]
        begin = time.monotonic()
        store.set("a", "b")
        assert store.get("a") == b"b"
        assert (
            time.monotonic() - begin < len(strangers) * 0.3 / 2
        )  # one after the other they would hold it twice as long
        for stranger in strangers:
            assert len(stranger.recv(64)) == 32  # the challenge
            assert stranger.recv(64) == b""  # closed


@pytest.mark.parametrize("how", ["changed", "repeated", "reflected"])
def test_what_is_put_into_a_session_is_refused(how: str) -> None:
    ours, theirs = Session(KEY, SERVER, b"1", b"2"), Session(KEY, CLIENT, b"1", b"2")
    frame = theirs.seal([b"set", b"key", b"value"])[4:]
    if how == "changed":
        frame = frame.replace(b"value", b"other")
    elif how == "repeated":
        assert ours.open(frame) == [b"set", b"key", b"value"]
    else:
        frame = ours.seal([b"set", b"key", b"value"])[4:]
    with pytest.raises(Refused):
        ours.open(frame)


VICTIM = """
import sys
from datetime import timedelta
import torch.distributed as dist
from vime.system.rendezvous import group_store
rank, port = int(sys.argv[1]), int(sys.argv[2])
store = group_store("127.0.0.3", port, rank, 2, timedelta(seconds=60), b"of this run")
print("up", flush=True)
sys.stdin.readline()
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
found = [None, None]
dist.all_gather_object(found, f"rank {rank}")
print(found, flush=True)
"""
ATTACKER = """
import contextlib, os, socket, sys
from datetime import timedelta
import torch.distributed as dist
address, port, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
try:
    if how == "torch":
        store = dist.TCPStore(address, port, 2, False, timeout=timedelta(seconds=5), wait_for_workers=False)
    else:
        from vime.system.guarded_store import GuardedStore
        store = GuardedStore(address, port, b"guessed", timedelta(seconds=5))
    for rank in range(2):
        store.set(f"group/default_pg/0//cpu//{rank}", "poison")
    print("wrote")
except RuntimeError as error:
    print("refused")
with contextlib.suppress(ConnectionError), socket.create_connection((address, port), timeout=5) as raw:
    raw.sendall(os.urandom(100000))
"""


@pytest.mark.parametrize("how", ["torch", "wrong-key"])
def test_an_attacker_s_process_cannot_write_and_the_ranks_meet_all_the_same(how: str) -> None:
    command, port = [sys.executable, "-c"], free_port()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*command, VICTIM, str(rank), str(port)], **pipes) for rank in range(2)]
    try:
        assert [rank.stdout.readline() for rank in ranks] == ["up\n"] * 2
        attack = [*command, ATTACKER, "127.0.0.3", str(port), how]
        assert subprocess.run(attack, capture_output=True, text=True, timeout=patience.PROCESS).stdout == "refused\n"
        for rank in ranks:
            rank.stdin.write("go\n")
            rank.stdin.flush()
        assert [rank.communicate(timeout=patience.PROCESS)[0] for rank in ranks] == ["['rank 0', 'rank 1']\n"] * 2
    finally:
        for rank in ranks:
            rank.kill()


# -- objects --


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self._path,)


INTRUDER = """
import sys
from datetime import timedelta
import torch.distributed as dist
from tests.system.test_guarded_store import Bomb
from pathlib import Path
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), 2, False, timeout=timedelta(seconds=60), wait_for_workers=False)
dist.init_process_group("gloo", store=dist.PrefixStore("g", store), rank=1, world_size=2)
dist.broadcast_object_list([Bomb(Path(sys.argv[2]))], src=1)
"""


@pytest.mark.parametrize("signed", [False, True])
def test_an_object_of_one_who_got_into_a_group_is_not_unpickled(signed: bool, tmp_path: Path) -> None:
    """A process in a rank's place, through a store without a key, sends a pickle that runs code."""
    made = tmp_path / "made"
    port = free_port()
    command = [sys.executable, "-c", INTRUDER, str(port), str(made)]
    store = dist.TCPStore("127.0.0.1", port, 2, True, timeout=LIMIT, wait_for_workers=False)
    with subprocess.Popen(command) as intruder:
        dist.init_process_group("gloo", store=dist.PrefixStore("g", store), rank=0, world_size=2)
        try:
            if signed:
                sign_objects(KEY)
            with pytest.raises(UnsignedObject) if signed else contextlib.nullcontext():
                dist.broadcast_object_list([None], src=1)
        finally:
            leave_objects_unsigned()
            dist.destroy_process_group()
            intruder.kill()
    assert made.exists() != signed


def test_signed_objects_of_the_run_arrive() -> None:
    sign_objects(KEY)
    try:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        found = [None]
        dist.all_gather_object(found, {"a": [1, 2]})
        dist.destroy_process_group()
    finally:
        leave_objects_unsigned()
    assert found == [{"a": [1, 2]}]

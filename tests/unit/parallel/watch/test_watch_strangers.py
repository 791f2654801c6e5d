"""Where the watch and the ranks' store listen, and who is answered when the hub is gone."""

from __future__ import annotations

import datetime
import random
import socket
import threading
import types
from typing import Any

import pytest
import torch.distributed as dist

from sfa_dist.errors import LostRankError
from sfa_dist.parallel import joining, rendezvous
from sfa_dist.parallel.joining import _endpoint_key, _unreached
from sfa_dist.parallel.launch import Launch
from sfa_dist.parallel.rendezvous import RendezvousConfig, read_rendezvous
from sfa_dist.parallel.stop_flag import StopFlag
from sfa_dist.parallel.watch.guard import _Guard
from sfa_dist.parallel.watch.lines import Lines


def guard(ranks_on_node: int) -> Any:
    launch = Launch("torchrun", 0, 2, 0, ranks_on_node)
    runtime = types.SimpleNamespace(
        rank=0, host="h", world_size=2, launch=launch, is_main=True, broadcast=lambda value: value
    )
    return _Guard(runtime, "node1", None, StopFlag())  # type: ignore[arg-type]


def test_the_hub_of_one_node_listens_to_that_node_alone() -> None:
    for ranks, bound, told in ((2, "127.0.0.1", "127.0.0.1"), (1, "0.0.0.0", "node1")):
        made = guard(ranks)
        assert made._listener.getsockname()[0] == bound
        assert made._settings["hub"][0] == told
        made.close()


def test_nobody_who_says_nothing_keeps_others_from_hearing_that_there_is_no_hub() -> None:
    made = guard(2)
    address = made._listener.getsockname()
    threading.Thread(target=made._turn_away, daemon=True).start()
    silent = [socket.create_connection(address) for _ in range(20)]
    for _ in range(5):
        with socket.create_connection(address, timeout=5) as stream:
            child = Lines(stream)
            child.send({"token": "x", "rank": 1})
            assert next(child.receive()) == {"kind": "off"}
    for stream in silent:
        stream.close()


def meeting(ranks_on_node: int, address: str = "127.0.0.1") -> RendezvousConfig:
    with socket.create_server((address, 0)) as free:
        port = free.getsockname()[1]
    environ = {"MASTER_ADDR": address, "MASTER_PORT": str(port), rendezvous.LIMIT_VARIABLE: "5"}
    return read_rendezvous(environ, Launch("torchrun", 0, 2, 0, ranks_on_node))


def listens_at(port: int) -> set[str]:
    """The IPv4 addresses, and `::` for IPv6, at which a port takes connections (/proc/net/tcp)."""
    found = set()
    for name in ("tcp", "tcp6"):
        with open(f"/proc/net/{name}", encoding="ascii") as file:
            for line in list(file)[1:]:
                address, state = line.split()[1], line.split()[3]
                if state == "0A" and int(address.rpartition(":")[2], 16) == port:
                    packed = bytes.fromhex(address.rpartition(":")[0])[::-1]
                    found.add(socket.inet_ntoa(packed) if name == "tcp" else "::")
    return found


def test_the_store_of_one_node_listens_to_that_node_alone_and_outlives_strangers() -> None:
    config = meeting(2)
    store = rendezvous._serve_store(config)
    assert listens_at(config.port) == {"127.0.0.1"}
    random_ = random.Random(0)
    for _ in range(50):
        with socket.create_connection((config.host, config.port), timeout=5) as stranger:
            stranger.sendall(
                random_.choice((b"GET / HTTP/1.1\r\n\r\n", random_.randbytes(300), b"\0" * 100, b"[" * 9999))
            )
    guest = dist.TCPStore(config.host, config.port, 2, False, datetime.timedelta(seconds=5), wait_for_workers=False)
    guest.set("a", "b")
    assert store.get("a") == b"b"
    with pytest.raises(LostRankError, match="the port is in use"):
        rendezvous._serve_store(config)


def test_the_store_of_several_nodes_listens_to_all() -> None:
    config = meeting(1)
    store = rendezvous._serve_store(config)
    assert listens_at(config.port) & {"::", "0.0.0.0"}
    del store


@pytest.mark.parametrize("said", ["", "[", "{}", "[1, 2]", "null", "[" * 5000])
def test_an_endpoint_that_no_rank_has_written_is_an_error(said: str) -> None:
    store = dist.HashStore()
    store.set(_endpoint_key(1), said)
    with pytest.raises(LostRankError, match="another program answers for rank 1"):
        _unreached(meeting(1), store)


def test_no_endpoint_is_open_on_one_node() -> None:
    store = dist.HashStore()
    config = meeting(2)
    with joining._publish_endpoint(config, store, {}):
        assert b", 0]" in store.get(_endpoint_key(0))

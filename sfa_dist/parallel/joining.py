"""How the ranks connect after the rendezvous: every rank to every other one, at an address of its node.

gloo reports a failure only on the rank where it occurs; the others would wait until the collective's timeout. Here the
first failure is reported to all ranks, and nodes that cannot be reached are named.

A node's own name may resolve to its loopback address (`127.0.1.1 node2` in /etc/hosts, as Debian's installer writes it)
or not at all. gloo would then publish an address that leads the other nodes to themselves, so the interface that leads
to the other nodes is chosen for it.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import ipaddress
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch.distributed as dist

from sfa_dist.errors import LostRankError, PreemptedError
from sfa_dist.parallel.environment import set_default
from sfa_dist.parallel.rendezvous import LIMIT_VARIABLE, POLL_S, RendezvousConfig, mark_stopped, raise_if_stopped

GLOO_VARIABLE, NCCL_VARIABLE = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915  # linux/sockios.h: an interface's IPv4 address, returned at byte 20 of struct ifreq.
FAULT, CAUSE, JOINED = "join/fault", "join/cause", "join/joined"
SHORTEST_POLL_S, LONGEST_POLL_S = 0.01, 1.0
PROBE_S = 3.0
SHOWN = 4  # Unreachable nodes that a message names; to find each may take PROBE_S.
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Endpoint:
    """Where a rank's node takes connections. `port` only accepts them, to test whether it is reachable; 0 for none."""

    rank: int
    host: str
    address: str
    port: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} at {self.address}"


def join(
    backend: str, config: RendezvousConfig, store: dist.Store, environ: Mapping[str, str], timeout: datetime.timedelta
) -> None:
    """init_process_group over the ranks' `store`; `timeout` is that of the collectives.

    Raises LostRankError on every rank if it fails on one or takes longer than `config.limit` seconds, PreemptedError
    on every rank if one is asked to stop meanwhile.
    """
    own = store.clone()  # On the store's own connection a request would queue behind gloo's wait for a key.
    own.set(_route_key(config.rank), _route(config.host, config.port))
    try:
        for variable in (GLOO_VARIABLE, NCCL_VARIABLE) if "nccl" in backend else (GLOO_VARIABLE,):
            require_interface(config, variable, environ.get(variable, ""))
        with _publish_endpoint(config, own, environ):
            _connect(backend, config, store, own, timeout)
    except LostRankError as error:
        # The first rank to report a failure knows its cause best.
        first = LostRankError(own.compare_set(FAULT, "", str(error)).decode())
        first.print_suppressed = not config.prints_errors
        if config.rank == 0:
            time.sleep(5 * POLL_S)  # The store ends with this process: the others need time to read.
        raise first from error
    except PreemptedError:
        mark_stopped(own)
        raise
    except dist.DistError as error:
        raise config.error(f"rank 0 at {config.address} went away while the ranks connected") from error


def require_interface(config: RendezvousConfig, variable: str, wanted: str) -> None:
    """Raises LostRankError if `variable` is set to a network interface that this node does not have.

    gloo takes complete names and needs all of them. NCCL takes prefixes, of which one must match; a leading `=` makes
    them complete names, a leading `^` excludes them.
    """
    has = [name for _, name in socket.if_nameindex()]
    words = [word for word in wanted.removeprefix("=").split(",") if word]
    if variable == GLOO_VARIABLE:
        missing = [word for word in words if word not in has]
    elif wanted.startswith("^") or any(
        word in has if wanted.startswith("=") else any(name.startswith(word) for name in has) for word in words
    ):
        return
    else:
        missing = words
    if missing:
        raise config.error(
            f"{variable}={wanted}, but this node has no interface {', '.join(missing)} (it has {', '.join(has)}); set "
            "it to one that leads to the other nodes, on each node if their names differ"
        )


@contextlib.contextmanager
def _publish_endpoint(config: RendezvousConfig, store: dist.Store, environ: Mapping[str, str]) -> Iterator[None]:
    """Publishes where this node takes gloo's connections, and listens there for the others' probes inside the block.

    If the node's name resolves to its loopback, gloo gets the interface that leads to the other nodes instead.
    """
    host = socket.gethostname()
    with contextlib.ExitStack() as stack:
        port = 0
        if config.several_nodes:
            with contextlib.suppress(OSError):  # Then the others cannot test whether they reach this node.
                port = stack.enter_context(_listen()).getsockname()[1]
        if chosen := environ.get(GLOO_VARIABLE, "").split(",")[0]:
            address = _addresses().get(chosen, chosen)
        else:
            address = _resolved(host)
            if config.several_nodes and ipaddress.ip_address(address).is_loopback:
                address = _choose_interface(config, store) or address
        store.set(_endpoint_key(config.rank), json.dumps([config.rank, host, address, port]))
        yield


def _choose_interface(config: RendezvousConfig, store: dist.Store) -> str | None:
    """Sets gloo's interface to the one that leads to the other nodes and returns its address; None if none is found."""
    address = _route(config.host, config.port)
    if ipaddress.ip_address(address).is_loopback:  # On rank 0's node. The last rank is on another node.
        other = store.get(_route_key(config.world_size - 1)).decode()
        address = _route(other, config.port)
    for interface, candidate in _addresses().items():
        if candidate == address and not ipaddress.ip_address(candidate).is_loopback:
            set_default(GLOO_VARIABLE, interface)
            return address
    return None


def _connect(
    backend: str, config: RendezvousConfig, store: dist.Store, own: dist.Store, timeout: datetime.timedelta
) -> None:
    faults: list[Exception] = []
    over = threading.Event()

    def connect() -> None:
        try:
            dist.init_process_group(
                backend, store=store, rank=config.rank, world_size=config.world_size, timeout=timeout
            )
            own.add(JOINED, 1)
        except (dist.DistError, RuntimeError, ValueError) as error:
            faults.append(error)
        over.set()

    # In a thread: gloo waits for the others and cannot be interrupted when one of them has failed.
    threading.Thread(target=connect, daemon=True).start()
    wait = _Wait(config, own)
    pause = SHORTEST_POLL_S
    while not over.is_set() or own.add(JOINED, 0) < config.world_size:
        raise_if_stopped(own)
        if own.check([FAULT]):
            raise LostRankError(own.get(FAULT).decode())
        if faults:
            raise config.error(f"{wait.cause()} ({str(faults[0]).splitlines()[0]})")
        wait.check()
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_POLL_S)


class _Wait:
    """A rank's wait for the others to connect. The first rank to find the cause of a delay shares it with all."""

    def __init__(self, config: RendezvousConfig, store: dist.Store) -> None:
        now = time.monotonic()
        self._config, self._store = config, store
        self._notice_at, self._until = now + config.patience, now + config.limit
        self._probed = self._noticed = False

    def cause(self) -> str:
        """What is wrong, as far as any rank knows. The first call probes the other nodes."""
        if not self._probed:
            self._probed = True
            if lost := _unreached(self._config, self._store):
                self._store.compare_set(CAUSE, "", lost)
        if self._store.check([CAUSE]):
            return self._store.get(CAUSE).decode()
        return "the ranks have met, but they do not connect"

    def check(self) -> None:
        """Prints the cause once when the wait is long. Raises LostRankError at the limit."""
        now, config = time.monotonic(), self._config
        if now >= self._until:
            raise config.error(f"{self.cause()} (after {config.limit:.0f} s; {LIMIT_VARIABLE} gives them more time)")
        if now < self._notice_at or self._noticed:
            return
        cause = self.cause()
        if config.prints_errors and (self._store.check([CAUSE]) or now >= self._notice_at + SHOWN * PROBE_S):
            self._noticed = True
            config.say(f"still waiting for the ranks to connect, at most {config.limit:.0f} s: {cause}")


def _unreached(config: RendezvousConfig, store: dist.Store) -> str:
    """A message that names the nodes this rank cannot reach; empty if it reaches all."""
    me = socket.gethostname()
    seen, lost = {me}, []
    for rank in range(config.world_size):
        if not store.check([_endpoint_key(rank)]):
            continue  # That node reports its own failure.
        try:
            endpoint = Endpoint(*json.loads(store.get(_endpoint_key(rank))))
        except (TypeError, ValueError, RecursionError) as error:
            raise config.error(f"another program answers for rank {rank} ({error})") from error
        if endpoint.host in seen or not endpoint.port:
            continue
        seen.add(endpoint.host)
        try:
            socket.create_connection((endpoint.address, endpoint.port), timeout=PROBE_S).close()
        except OSError as error:
            lost.append(f"{endpoint} ({error})")
        if len(lost) == SHOWN:
            break
    if not lost:
        return ""
    return (
        f"{me} does not reach {', '.join(lost)}; are all ports open between the nodes, and is this the address of the "
        f"right interface? {GLOO_VARIABLE} on that node chooses another one"
    )


def _endpoint_key(rank: int) -> str:
    return f"join/endpoint/{rank}"


def _route_key(rank: int) -> str:
    return f"join/route/{rank}"


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _resolved(host: str) -> str:
    """The address to which this node resolves a name; its loopback if the name cannot be resolved."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return LOOPBACK


def _route(host: str, port: int) -> str:
    """This node's address on the route to a host; its loopback if there is no route. Sends nothing."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return LOOPBACK


def _addresses() -> dict[str, str]:
    """IPv4 addresses of this node's interfaces, by interface name (Linux)."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # The interface has no IPv4 address.
                request = struct.pack("256s", name.encode()[:15])
                found[name] = socket.inet_ntoa(fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, request)[20:24])
    return found

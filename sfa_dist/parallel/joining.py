"""How ranks that have met connect: every rank to every other one, at an address of its node.

gloo says what went wrong only on the rank where it did; the others would wait for as long as a collective may take.
Here the first failure is told to all, and a rank that does not get through is named. And where a node's own name leads
to its loopback (`127.0.1.1 node2` in /etc/hosts, as Debian's installer writes it) or nowhere, gloo would hand the
others an address that leads to themselves: the interface that leads to the other nodes is taken in place of it.
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
SIOCGIFADDR = 0x8915  # linux/sockios.h: an interface's IPv4 address, which comes from byte 20 of struct ifreq on.
FAULT, CAUSE, JOINED = "join/fault", "join/cause", "join/joined"
SHORTEST_POLL_S, LONGEST_POLL_S = 0.01, 1.0
PROBE_S = 3.0
SHOWN = 4  # Unreachable nodes named in a message; each may take PROBE_S to find out.
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Endpoint:
    """Where a rank's node takes connections; at `port`, 0 for none, one that says nothing, to find out whether other
    nodes get there."""

    rank: int
    host: str
    address: str
    port: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} at {self.address}"


def join(
    backend: str, config: RendezvousConfig, store: dist.Store, environ: Mapping[str, str], timeout: datetime.timedelta
) -> None:
    """init_process_group, with `timeout` for its collectives.

    Raises LostRankError on every rank when it fails on one, or takes longer than ranks wait for each other.
    """
    own = store.clone()  # gloo's waiting for a key would hold back what is asked over the same connection.
    own.set(_way(config.rank), _route(config.host, config.port))
    try:
        for variable in (GLOO_VARIABLE, NCCL_VARIABLE) if "nccl" in backend else (GLOO_VARIABLE,):
            require_interface(config, variable, environ.get(variable, ""))
        with _publish_endpoint(config, own, environ):
            _connect(backend, config, store, own, timeout)
    except LostRankError as error:
        # What another rank has told before is the cause of it, or as good.
        first = LostRankError(own.compare_set(FAULT, "", str(error)).decode())
        first.print_suppressed = not config.prints_errors
        if config.rank == 0:
            time.sleep(5 * POLL_S)  # The store ends with this process: let the others read.
        raise first from error
    except PreemptedError:
        mark_stopped(own)
        raise
    except dist.DistError as error:
        raise config.error(f"rank 0 at {config.address} went away while the ranks connected") from error


def require_interface(config: RendezvousConfig, variable: str, wanted: str) -> None:
    """Raises LostRankError where a library would look for an interface that this node does not have.

    gloo takes whole names and needs all of them. NCCL needs one of the starts of names; `=` in front makes them whole
    names, `^` those that it shall not take.
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
    """Tells the others where gloo takes their connections on this node; where that is its loopback, it is changed."""
    host = socket.gethostname()
    with contextlib.ExitStack() as stack:
        port = 0
        if config.several_nodes:
            with contextlib.suppress(OSError):  # Then the others cannot try whether they get here.
                port = stack.enter_context(_listen()).getsockname()[1]
        if chosen := environ.get(GLOO_VARIABLE, "").split(",")[0]:
            address = _addresses().get(chosen, chosen)
        else:
            address = _resolved(host)
            if config.several_nodes and ipaddress.ip_address(address).is_loopback:
                address = _lead_to_others(config, store) or address
        store.set(_endpoint_key(config.rank), json.dumps([config.rank, host, address, port]))
        yield


def _lead_to_others(config: RendezvousConfig, store: dist.Store) -> str | None:
    """Has gloo take the interface that leads to the other nodes, and gives its address; None where none is found."""
    address = _route(config.host, config.port)
    if ipaddress.ip_address(address).is_loopback:  # Rank 0's node. Ranks go node by node: the last is on another one.
        other = store.get(_way(config.world_size - 1)).decode()
        address = _route(other, config.port)
    for interface, its in _addresses().items():
        if its == address and not ipaddress.ip_address(its).is_loopback:
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

    # A thread, as gloo waits for the others where nobody can tell it that one of them has failed.
    threading.Thread(target=connect, daemon=True).start()
    wait = _Wait(config, own)
    pause = SHORTEST_POLL_S
    while not over.is_set() or own.add(JOINED, 0) < config.world_size:
        raise_if_stopped(own)
        if own.check([FAULT]):
            raise LostRankError(own.get(FAULT).decode())
        if faults:
            raise config.error(f"{wait.cause()} ({str(faults[0]).splitlines()[0]})")
        wait.go_on()
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_POLL_S)


class _Wait:
    """A rank's patience with the others while they connect. Where one of them finds out what is wrong, all know."""

    def __init__(self, config: RendezvousConfig, store: dist.Store) -> None:
        now = time.monotonic()
        self._config, self._store = config, store
        self._look_at, self._until = now + config.patience, now + config.limit
        self._looked = self._said = False

    def cause(self) -> str:
        """What is wrong, as far as this rank or another one knows."""
        if not self._looked:
            self._looked = True
            if lost := _unreached(self._config, self._store):
                self._store.compare_set(CAUSE, "", lost)
        if self._store.check([CAUSE]):
            return self._store.get(CAUSE).decode()
        return "the ranks have met, but they do not connect"

    def go_on(self) -> None:
        """Says once what is wrong when it takes long. Raises LostRankError at the limit."""
        now, config = time.monotonic(), self._config
        if now >= self._until:
            raise config.error(f"{self.cause()} (after {config.limit:.0f} s; {LIMIT_VARIABLE} gives them more time)")
        if now < self._look_at or self._said:
            return
        cause = self.cause()
        if config.prints_errors and (self._store.check([CAUSE]) or now >= self._look_at + SHOWN * PROBE_S):
            self._said = True
            config.say(f"still waiting for the ranks to connect, at most {config.limit:.0f} s: {cause}")


def _unreached(config: RendezvousConfig, store: dist.Store) -> str:
    """Which nodes this rank cannot reach, in words; empty where it reaches all."""
    me = socket.gethostname()
    seen, lost = {me}, []
    for rank in range(config.world_size):
        if not store.check([_endpoint_key(rank)]):
            continue  # Its node said why, or is about to.
        try:
            endpoint = Endpoint(*json.loads(store.get(_endpoint_key(rank))))
        except (TypeError, ValueError, RecursionError) as error:
            raise config.error(f"another program than this one answers for rank {rank} ({error})") from error
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
    return f"join/door/{rank}"


def _way(rank: int) -> str:
    return f"join/way/{rank}"


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _resolved(host: str) -> str:
    """The address to which a name leads on this node; its loopback where it leads nowhere."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return LOOPBACK


def _route(host: str, port: int) -> str:
    """This node's address on the way to a host; its loopback where there is none. Sends nothing."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return LOOPBACK


def _addresses() -> dict[str, str]:
    """IPv4 addresses of this node's interfaces (Linux)."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # It has none.
                request = struct.pack("256s", name.encode()[:15])
                found[name] = socket.inet_ntoa(fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, request)[20:24])
    return found

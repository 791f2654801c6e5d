"""How the ranks find each other: a store at rank 0's address, and a roll call over it that names the missing ranks.

torch's own rendezvous says "timed out" on some ranks and waits for ever on others, for example if another program
listens at the port and does not answer. Here each kind of failure has its own message and a time limit.
"""

from __future__ import annotations

import datetime
import errno
import ipaddress
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch.distributed as dist

from sfa_dist.errors import LostRankError, PreemptedError, UsageError
from sfa_dist.parallel.launch import Launch, nodes_of_ranks

LIMIT_VARIABLE = "SFA_RENDEZVOUS_SECONDS"
DEFAULT_LIMIT_S = 600.0
POLL_S = 0.1
GRACE_S = 10.0  # The other ranks wait so much longer than rank 0, which reports who is missing.
NOTICE_S = 45.0  # After this time one rank prints for whom it waits; large runs may take minutes to start.
CONNECT_S = 5.0  # For one attempt to connect: a node that drops packets never answers.
SHOWN = 8  # Missing ranks that a message names.

OTHER_PORT = "choose another one by --master_port (deepspeed, torchrun), MASTER_PORT, or SFA_PORT_BASE for slurm/"


@dataclass(frozen=True)
class RendezvousConfig:
    """Where this rank meets the other ranks, and until when."""

    host: str
    port: int
    rank: int
    world_size: int
    hosted: bool  # The launcher serves the store: torchrun's agent already listens at the port.
    key: str  # Keeps two jobs that use the same port by mistake out of each other's roll call.
    limit: float  # Seconds.
    until: float  # Monotonic seconds.
    prints_errors: bool  # Whether this rank prints an error that all ranks raise.
    several_nodes: bool
    nodes: tuple[str, ...] = ()  # The node name of each rank; empty if the launcher does not give them.

    def error(self, what: str) -> LostRankError:
        """An error that names this rank and its host."""
        me = f"rank {self.rank} of {self.world_size} on {socket.gethostname()}"
        return LostRankError(f"{me}: {what}")

    @property
    def address(self) -> str:
        """host:port."""
        return f"{self.host}:{self.port}"

    @property
    def patience(self) -> float:
        """Seconds after which a rank prints for whom it waits."""
        return min(NOTICE_S, self.limit / 4)

    def notice(self) -> float:
        """The time at which `patience` is over (monotonic seconds)."""
        return self.until - self.limit + self.patience

    def say(self, what: str) -> None:
        """Prints a line to stderr while the ranks still wait."""
        print(f"rank {self.rank} on {socket.gethostname()}: {what}", file=sys.stderr, flush=True)

    def left(self) -> float:
        """Seconds until the limit, at least one."""
        return max(1.0, self.until - time.monotonic())


def meet(config: RendezvousConfig) -> dist.Store:
    """The store over which all ranks have met, for init_process_group.

    Raises LostRankError if the port is in use or cannot be reached, or if a rank does not come; PreemptedError if a
    rank is asked to stop meanwhile.
    """
    if config.rank == 0 and not config.hosted:
        store = _serve_store(config)
    else:
        _wait_for_listener(config)
        store = _connect_to_store(config)
    shared = dist.PrefixStore(config.key, store)
    try:
        _answer_roll_call(config, shared)
    except PreemptedError:
        mark_stopped(shared)
        raise
    except dist.DistError as error:
        raise config.error(
            f"the store at {config.address} went away before all ranks had met; see rank 0's message"
        ) from error
    return shared


def mark_stopped(store: dist.Store) -> None:
    """Records for the other ranks that this one was asked to stop, so that they do not wait for it."""
    store.set("stopped", "")
    time.sleep(5 * POLL_S)  # The store may end with this process: the others need time to read.


def raise_if_stopped(store: dist.Store) -> None:
    """Raises PreemptedError if another rank was asked to stop."""
    if store.check(["stopped"]):
        asked = PreemptedError("stopped before all ranks had met; run the same command again to go on")
        asked.print_suppressed = True
        raise asked


def read_rendezvous(environ: Mapping[str, str], launch: Launch) -> RendezvousConfig:
    """The rendezvous at MASTER_ADDR and MASTER_PORT, with SFA_RENDEZVOUS_SECONDS (default 600) as its limit.

    Raises UsageError if one of these variables has no valid value.
    """
    limit_text, port_text = environ.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT_S)), environ["MASTER_PORT"]
    try:
        limit = float(limit_text)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise UsageError(f"{LIMIT_VARIABLE}={limit_text!r} is not a number of seconds")
    if not port_text.isdecimal() or not 0 < int(port_text) < 2**16:
        raise UsageError(f"MASTER_PORT={port_text!r} is not a port (1 to 65535)")
    # Only srun gives the job id to all ranks: the deepspeed launcher does not pass it on to the other nodes.
    job = environ.get("SLURM_JOB_ID", "") if "RANK" not in environ else ""
    return RendezvousConfig(
        host=environ["MASTER_ADDR"],
        port=int(port_text),
        rank=launch.rank,
        world_size=launch.world_size,
        hosted=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        key=f"sfa_dist/{job}/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
        limit=limit,
        until=time.monotonic() + limit,
        prints_errors=launch.prints_errors,
        several_nodes=launch.local_world_size < launch.world_size,
        nodes=nodes_of_ranks(environ, launch),
    )


def _serve_store(config: RendezvousConfig) -> dist.Store:
    """Rank 0's store. Raises LostRankError if it cannot listen at the address."""
    try:
        if config.several_nodes or not _is_loopback(config.host):
            return _store(config, is_master=True)
        with socket.create_server((config.host, config.port)) as listener:  # torch would listen on all interfaces.
            return _store(config, is_master=True, listener=os.dup(listener.fileno()))
    except (dist.DistError, OSError, RuntimeError, ValueError) as error:
        in_use = "EADDRINUSE" in str(error) or getattr(error, "errno", None) == errno.EADDRINUSE
        why = "the port is in use" if in_use else str(error).splitlines()[0]
        raise config.error(f"cannot listen at {config.address} ({why}); {OTHER_PORT}") from error


def _wait_for_listener(config: RendezvousConfig) -> None:
    """Returns when a process listens at the port. Raises LostRankError at the limit.

    torch's client would wait too, but print a C++ stack trace for each attempt.
    """
    noticed = not (config.prints_errors or config.rank == 1)
    while True:
        try:
            socket.create_connection((config.host, config.port), timeout=min(CONNECT_S, config.left())).close()
            return
        except OSError as error:
            if not noticed and time.monotonic() >= config.notice():
                noticed = True
                waits = f"waiting for rank 0 at {config.address} ({error}), at most {config.limit:.0f} s in all"
                config.say(waits)
            if time.monotonic() >= config.until:
                raise config.error(
                    f"nobody answers at {config.address} after {config.limit:.0f} s ({error}); did rank 0 start, is "
                    f"MASTER_ADDR its node, and is the port open between the nodes? If it is not, {OTHER_PORT}"
                ) from error
            time.sleep(POLL_S)


def _connect_to_store(config: RendezvousConfig) -> dist.Store:
    """A client of rank 0's store. Raises LostRankError if another program listens at the address."""
    made: list[dist.Store] = []
    faults: list[Exception] = []

    def connect() -> None:
        try:
            made.append(_store(config, is_master=False))
        except (dist.DistError, RuntimeError, ValueError) as error:
            faults.append(error)

    # In a thread: the client waits for ever if the listener accepts the connection but never answers.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(config.left())
    if made:
        return made[0]
    why = str(faults[0]).splitlines()[0] if faults else f"no answer in {config.limit:.0f} s"
    raise config.error(f"what listens at {config.address} is not rank 0 of this run ({why}); {OTHER_PORT}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except OSError:
        return False


def _store(config: RendezvousConfig, is_master: bool, listener: int | None = None) -> dist.Store:
    return dist.TCPStore(
        config.host,
        config.port,
        config.world_size,
        is_master,
        datetime.timedelta(seconds=config.left()),
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener,
    )


def _answer_roll_call(config: RendezvousConfig, store: dist.Store) -> None:
    """Returns when all ranks are here. Rank 0 waits for each of them and publishes who is missing.

    Raises LostRankError on every rank if some are missing.
    """
    store.set(f"here/{config.rank}", "")
    if config.rank == 0:
        missing = _missing(config, store)
        store.set("missing", _names(config, missing))
        if missing:
            time.sleep(5 * POLL_S)  # The store ends with this process: the others need time to read.
    elif not _wait(store, "missing", config.until + GRACE_S):
        raise config.error(f"rank 0 did not come to {config.address} within {config.limit:.0f} s")
    if missing_ranks := store.get("missing").decode():
        error = config.error(
            f"{missing_ranks} of {config.world_size} did not come to {config.address} within {config.limit:.0f} s; "
            f"see what their nodes report, or give them more time by {LIMIT_VARIABLE}"
        )
        error.print_suppressed = not config.prints_errors
        raise error


def _missing(config: RendezvousConfig, store: dist.Store) -> list[int]:
    """The ranks that have not come at the limit. Prints for whom it waits after `config.patience` seconds."""

    def absent(ranks: Iterable[int], until: float) -> list[int]:
        return [rank for rank in ranks if not _wait(store, f"here/{rank}", until)]

    late = absent(range(config.world_size), config.notice())
    if late:
        config.say(f"waiting for {_names(config, late)} at {config.address}, at most {config.limit:.0f} s in all")
    return absent(late, config.until)


def _wait(store: dist.Store, key: str, until: float) -> bool:
    """Whether `key` is set before `until`. It polls, so that signals are handled meanwhile."""
    while not store.check([key]):
        raise_if_stopped(store)
        if time.monotonic() >= until:
            return False
        time.sleep(POLL_S)
    return True


def _names(config: RendezvousConfig, ranks: list[int]) -> str:
    """The ranks and their nodes, such as `ranks 2, 3 (node2)`; at most SHOWN of them."""
    if not ranks:
        return ""
    more = f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
    where = ""
    if config.nodes:
        where = f" ({', '.join(dict.fromkeys(config.nodes[rank] for rank in ranks[:SHOWN]))})"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:SHOWN]))}{more}{where}"

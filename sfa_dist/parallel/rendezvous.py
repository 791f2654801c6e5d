"""How the ranks find each other: a store at rank 0's address, and a roll call over it that names who is missing.

torch's own rendezvous says "timed out" on some ranks and waits for ever on others (a program that listens at the port
but does not answer, for one). Here each way to fail has its own message, and a limit.
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
GRACE_S = 10.0  # What the others wait longer than rank 0, which says who is missing.
NOTICE_S = 45.0  # After which one rank says for whom it waits; large runs may take minutes to start.
KNOCK_S = 5.0  # A node that takes no packets answers nothing at all.
SHOWN = 8  # Missing ranks named in a message.

OTHER_PORT = "choose another one by --master_port (deepspeed, torchrun), MASTER_PORT, or SFA_PORT_BASE for slurm/"


@dataclass(frozen=True)
class RendezvousConfig:
    """Where this rank meets which others, and until when (monotonic seconds)."""

    host: str
    port: int
    rank: int
    world_size: int
    hosted: bool  # By the launcher: torchrun's agent listens at the port already.
    key: str  # Two jobs that come to the same port by mistake do not answer each other's roll call.
    limit: float
    until: float
    prints_errors: bool  # Prints what all ranks raise.
    several_nodes: bool
    nodes: tuple[str, ...] = ()  # By rank, where the launcher tells.

    def error(self, what: str) -> LostRankError:
        """An error that says which rank this is, and where it was to meet the others."""
        me = f"rank {self.rank} of {self.world_size} on {socket.gethostname()}"
        return LostRankError(f"{me}: {what}")

    @property
    def address(self) -> str:
        """host:port."""
        return f"{self.host}:{self.port}"

    @property
    def patience(self) -> float:
        """Seconds after which it is said for whom one waits."""
        return min(NOTICE_S, self.limit / 4)

    def notice(self) -> float:
        """When that is (monotonic seconds)."""
        return self.until - self.limit + self.patience

    def say(self, what: str) -> None:
        """A line for the console, while there is still hope."""
        print(f"rank {self.rank} on {socket.gethostname()}: {what}", file=sys.stderr, flush=True)

    def left(self) -> float:
        """Seconds until the limit, at least one."""
        return max(1.0, self.until - time.monotonic())


def meet(config: RendezvousConfig) -> dist.Store:
    """The store over which all ranks have met, for init_process_group.

    Raises LostRankError where the port is taken, cannot be reached, or a rank does not come.
    """
    if config.rank == 0 and not config.hosted:
        store = _host(config)
    else:
        _wait_for_listener(config)
        store = _enter(config)
    shared = dist.PrefixStore(config.key, store)
    try:
        _answer_roll_call(config, shared)
    except PreemptedError:
        mark_stopped(shared)
        raise
    except dist.DistError as error:
        raise config.error(
            f"the store at {config.address} went away before all ranks had met; see what rank 0 says"
        ) from error
    return shared


def mark_stopped(store: dist.Store) -> None:
    """Tells the others that they need not wait for this rank: it was asked to stop."""
    store.set("stopped", "")
    time.sleep(5 * POLL_S)  # The store may end with this process: let the others read.


def raise_if_stopped(store: dist.Store) -> None:
    """Raises PreemptedError when another rank was asked to stop."""
    if store.check(["stopped"]):
        asked = PreemptedError("stopped before all ranks had met; run the same command again to go on")
        asked.print_suppressed = True
        raise asked


def arrange(environ: Mapping[str, str], launch: Launch) -> RendezvousConfig:
    """MASTER_ADDR and MASTER_PORT say where the ranks meet, SFA_RENDEZVOUS_SECONDS (default 600) how long they wait.

    Raises UsageError where these are wrong.
    """
    limit_text, port_text = environ.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT_S)), environ["MASTER_PORT"]
    try:
        limit = float(limit_text)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise UsageError(f"{LIMIT_VARIABLE}={limit_text!r} is no number of seconds")
    if not port_text.isdecimal() or not 0 < int(port_text) < 2**16:
        raise UsageError(f"MASTER_PORT={port_text!r} is no port (1 to 65535)")
    # A batch script's job id would not do for the deepspeed launcher, which does not hand it to the other nodes.
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


def _host(config: RendezvousConfig) -> dist.Store:
    """Rank 0's store. Raises LostRankError when it cannot listen there."""
    try:
        if config.several_nodes or not _is_loopback(config.host):
            return _store(config, is_master=True)
        with socket.create_server((config.host, config.port)) as listener:  # torch itself would listen everywhere.
            return _store(config, is_master=True, listener=os.dup(listener.fileno()))
    except (dist.DistError, OSError, RuntimeError, ValueError) as error:
        in_use = "EADDRINUSE" in str(error) or getattr(error, "errno", None) == errno.EADDRINUSE
        why = "the port is in use" if in_use else str(error).splitlines()[0]
        raise config.error(f"cannot listen at {config.address} ({why}); {OTHER_PORT}") from error


def _wait_for_listener(config: RendezvousConfig) -> None:
    """Returns when somebody listens at the port: torch's client reports each attempt with a stack of C++ calls."""
    told = not (config.prints_errors or config.rank == 1)
    while True:
        try:
            socket.create_connection((config.host, config.port), timeout=min(KNOCK_S, config.left())).close()
            return
        except OSError as error:
            if not told and time.monotonic() >= config.notice():
                told = True
                waits = f"waiting for rank 0 at {config.address} ({error}), at most {config.limit:.0f} s in all"
                config.say(waits)
            if time.monotonic() >= config.until:
                raise config.error(
                    f"nobody answers at {config.address} after {config.limit:.0f} s ({error}); did rank 0 start, is "
                    f"MASTER_ADDR its node, and is the port open between the nodes? If it is not, {OTHER_PORT}"
                ) from error
            time.sleep(POLL_S)


def _enter(config: RendezvousConfig) -> dist.Store:
    """A client of the store. Raises LostRankError when it is another program that listens there."""
    made: list[dist.Store] = []
    faults: list[Exception] = []

    def enter() -> None:
        try:
            made.append(_store(config, is_master=False))
        except (dist.DistError, RuntimeError, ValueError) as error:
            faults.append(error)

    # A thread, as the client waits without end for a program that takes the connection and says nothing.
    thread = threading.Thread(target=enter, daemon=True)
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
    """Returns when all ranks are here. Rank 0 waits for each and tells the others what came of it."""
    store.set(f"here/{config.rank}", "")
    if config.rank == 0:
        missing = _missing(config, store)
        store.set("missing", _names(config, missing))
        if missing:
            time.sleep(5 * POLL_S)  # The store ends with this process: let the others read.
    elif not _wait(store, "missing", config.until + GRACE_S):
        raise config.error(f"rank 0 did not come to {config.address} within {config.limit:.0f} s")
    if missing_ranks := store.get("missing").decode():
        error = config.error(
            f"{missing_ranks} of {config.world_size} did not come to {config.address} within {config.limit:.0f} s; "
            f"look at what their nodes say, or give them more time by {LIMIT_VARIABLE}"
        )
        error.print_suppressed = not config.prints_errors
        raise error


def _missing(config: RendezvousConfig, store: dist.Store) -> list[int]:
    """The ranks that do not come until the limit. For whom it waits is said before."""

    def absent(ranks: Iterable[int], until: float) -> list[int]:
        return [rank for rank in ranks if not _wait(store, f"here/{rank}", until)]

    late = absent(range(config.world_size), config.notice())
    if late:
        config.say(f"waiting for {_names(config, late)} at {config.address}, at most {config.limit:.0f} s in all")
    return absent(late, config.until)


def _wait(store: dist.Store, key: str, until: float) -> bool:
    """Whether the key is there by then. By polling, so that signals are taken meanwhile."""
    while not store.check([key]):
        raise_if_stopped(store)
        if time.monotonic() >= until:
            return False
        time.sleep(POLL_S)
    return True


def _names(config: RendezvousConfig, ranks: list[int]) -> str:
    """`ranks 2, 3 (node2)`: of as many as fit into a line."""
    if not ranks:
        return ""
    more = f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
    where = ""
    if config.nodes:
        where = f" ({', '.join(dict.fromkeys(config.nodes[rank] for rank in ranks[:SHOWN]))})"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:SHOWN]))}{more}{where}"

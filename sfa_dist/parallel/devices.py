"""Which device a rank computes on, and which CPU cores are its own.

Each rank chooses for itself. Before they connect, all ranks compare: a rank that would train on the CPU by mistake, or
on another rank's GPU, stops them all.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from sfa_dist.boundary.disk import parse_json
from sfa_dist.errors import PreemptedError, UsageError
from sfa_dist.parallel.environment import hide_gpus
from sfa_dist.parallel.launch import Launch
from sfa_dist.parallel.rendezvous import POLL_S, RendezvousConfig, mark_stopped, raise_if_stopped

DeviceChoice = Literal["auto", "cuda", "cpu"]
HIDING = ("", "-1", "NoDevFiles")  # Values of CUDA_VISIBLE_DEVICES that leave no GPU.
# What Slurm sets in a job that was given GPUs.
GPU_VARIABLES = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_GPUS")
BF16_SINCE = (8, 0)  # Compute capability: Ampere.
READ_S = 5.0  # Seconds that rank 0 waits at most until the others have read of a fault.
CPU = torch.device("cpu")
DEV = Path("/dev")


@dataclass(frozen=True)
class Place:
    """Where a rank runs: `gpu` is its GPU's UUID, "" on a CPU; `error` says why the rank has no device."""

    host: str
    gpu: str
    cores: tuple[int, ...]
    error: str = ""


def own_place(device: torch.device | None, error: str = "") -> Place:
    """This process's place, with the device that it has chosen."""
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device is not None and device.type == "cuda" else ""
    return Place(socket.gethostname(), gpu, tuple(sorted(os.sched_getaffinity(0))), error)


def choose_device(wanted: DeviceChoice, launch: Launch, environ: Mapping[str, str]) -> torch.device:
    """The device that a recipe's `device` names: with `auto` a GPU where there are any, else the CPU.

    With `cpu` the GPUs are hidden from this process and its children. Raises UsageError where no GPU can be used and
    either one is wanted, or the machine or the job has some.
    """
    if wanted == "cpu":
        hide_gpus()
        return CPU
    if torch.cuda.is_available():
        return torch.device("cuda", _index_of_gpu(launch.local_rank, torch.cuda.device_count()))
    hidden = environ.get("CUDA_VISIBLE_DEVICES", "0") in HIDING
    trace = "" if hidden else _trace_of_gpus(environ)
    if wanted == "auto" and not trace:
        return CPU
    host = socket.gethostname()
    if hidden:
        text = f"device: cuda, but CUDA_VISIBLE_DEVICES hides all GPUs of {host}"
        raise UsageError(f"{text}: unset it, or set device: cpu")
    raise UsageError(
        f"torch can use no GPU on {host} ({_why_no_gpu()}), but {trace or 'the recipe says device: cuda'}. "
        "Compare the driver (nvidia-smi) with the CUDA version of torch, and give a container its GPUs (docker --gpus "
        "all, apptainer --nv); to train on the CPU, set device: cpu"
    )


def refusal_of_bf16(device: torch.device) -> str:
    """Why `device` cannot compute in bf16; "" if it can."""
    if device.type != "cuda" or (own := torch.cuda.get_device_capability(device)) >= BF16_SINCE:
        return ""
    least, has = (".".join(map(str, capability)) for capability in (BF16_SINCE, own))
    name = torch.cuda.get_device_name(device)
    return f"bf16 needs a GPU of compute capability {least} or more, and {name} has {has}"


def agree(own: Place, config: RendezvousConfig, store: dist.Store) -> int:
    """Compares the places of all ranks, and returns the number of ranks that share this rank's cores. Collective.

    Raises UsageError on every rank if `fault_of` finds a fault, PreemptedError if a rank is asked to stop meanwhile,
    LostRankError if one goes away.
    """
    try:
        fault, sharers = _compared(own, config, store)
    except PreemptedError:
        mark_stopped(store)
        raise
    except dist.DistError as error:
        raise config.error("a rank went away while the ranks compared their devices") from error
    if not fault:
        return sharers
    refusal = UsageError(fault)
    refusal.print_suppressed = not config.prints_errors
    raise refusal


def _compared(own: Place, config: RendezvousConfig, store: dist.Store) -> tuple[str, int]:
    """The fault that rank 0 finds, and how many ranks share this rank's cores."""
    key, others = "places/{}".format, range(1, config.world_size)
    until = time.monotonic() + config.limit
    if config.rank:
        store.set(key(config.rank), json.dumps(asdict(own)))
    else:
        told = [parse_json(_await(store, key(rank), config, until)) for rank in others]
        places = [own, *(Place(**{**place, "cores": tuple(place["cores"])}) for place in told)]
        store.set(key("verdict"), json.dumps([fault_of(places), core_sharers(places)]))
    fault, sharers = parse_json(_await(store, key("verdict"), config, until))
    if config.rank:
        store.set(key(f"read/{config.rank}"), "")
    elif fault:  # The store ends with this process: the others need time to read.
        read = [key(f"read/{rank}") for rank in others]
        soon = time.monotonic() + READ_S
        with suppress(dist.DistError):
            while not store.check(read) and time.monotonic() < soon:
                time.sleep(POLL_S)
    return str(fault), int(sharers[config.rank])


def _await(store: dist.Store, key: str, config: RendezvousConfig, until: float) -> bytes:
    """The value of a key that another rank sets. Not by a wait in the store, which would hold up a stop request."""
    while not store.check([key]):
        raise_if_stopped(store)
        if time.monotonic() > until:
            raise config.error(f"no answer in {config.limit:.0f} s while the ranks compared their devices ({key})")
        time.sleep(POLL_S / 10)
    return bytes(store.get(key))


def fault_of(places: Sequence[Place]) -> str:
    """Why these ranks cannot train together; "" if they can.

    A rank has no device, some ranks have GPUs and some do not, or two ranks have the same one.
    """
    for rank, place in enumerate(places):
        if place.error:
            return f"rank {rank}: {place.error}"
    without = [rank for rank, place in enumerate(places) if not place.gpu]
    if without and len(without) < len(places):
        rank = without[0]
        return (
            f"rank {rank} on {places[rank].host} has no GPU ({len(without)} of {len(places)} ranks have none): start "
            "ranks on nodes with GPUs alone, or set device: cpu"
        )
    first: dict[tuple[str, str], int] = {}
    for rank, place in enumerate(places):
        other = first.setdefault((place.host, place.gpu or str(rank)), rank)
        if other != rank:
            return (
                f"ranks {other} and {rank} on {place.host} have the same GPU, {place.gpu}: start one rank for each GPU "
                "(srun: as many --ntasks-per-node as --gpus-per-node), and let CUDA_VISIBLE_DEVICES show each rank "
                "its own or all of them"
            )
    return ""


def core_sharers(places: Sequence[Place]) -> list[int]:
    """For each rank, how many ranks may run on one of its cores, at most: 1 where the launcher has bound them apart."""
    users = Counter((place.host, core) for place in places for core in place.cores)
    return [max(users[place.host, core] for core in place.cores) for place in places]


def _index_of_gpu(local_rank: int, count: int) -> int:
    """The rank's own GPU among the visible ones. A single one is its own: launchers may show each rank only that.

    Raises UsageError if there are fewer than ranks.
    """
    if local_rank < count:
        return local_rank
    if count == 1:
        return 0
    raise UsageError(
        f"local rank {local_rank} has no GPU of its own: {socket.gethostname()} shows it {count}; start fewer ranks on "
        "a node, or show each rank one GPU (srun --gpus-per-task=1) or all"
    )


def _trace_of_gpus(environ: Mapping[str, str]) -> str:
    """What says that there are GPUs here; "" if nothing does."""
    found = next(iter(sorted(DEV.glob("nvidia[0-9]*"))), None)
    if found is not None:
        return f"{found} is there"
    given = next((name for name in GPU_VARIABLES if environ.get(name, "0") not in ("", "0")), None)
    return f"the job has GPUs ({given}={environ[given]})" if given else ""


def _why_no_gpu() -> str:
    """torch's own reason, in one line."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())[:160]
    return "it counts none"

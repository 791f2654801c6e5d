"""Which device a rank computes on, and which CPU cores are its own.

Each rank chooses for itself. Before they connect, all ranks compare: a rank that would train on the CPU by mistake, or
on another rank's GPU, stops them all.
"""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from sfa_dist.boundary.disk import parse_json
from sfa_dist.errors import UsageError
from sfa_dist.parallel.environment import hide_gpus
from sfa_dist.parallel.launch import Launch

DeviceChoice = Literal["auto", "cuda", "cpu"]
HIDING = ("", "-1", "NoDevFiles")  # Values of CUDA_VISIBLE_DEVICES that leave no GPU.
# What Slurm sets in a job that was given GPUs.
GPU_VARIABLES = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_GPUS")
# From which compute capability on a GPU has units for a precision: Ampere for bf16, Ada and Hopper for fp8.
LEAST_CAPABILITY = {"bf16": (8, 0), "fp8": (8, 9)}
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
    why = "CUDA_VISIBLE_DEVICES hides all GPUs" if hidden else _why_no_gpu()
    raise UsageError(
        f"torch can use no GPU on {socket.gethostname()} ({why}), but {trace or 'the recipe says device: cuda'}. "
        "Compare the driver (nvidia-smi) with the CUDA version of torch, and give a container its GPUs (docker --gpus "
        "all, apptainer --nv); to train on the CPU, set device: cpu"
    )


def refusal_of(device: torch.device, precision: str) -> str:
    """Why `device` cannot compute in `precision` (bf16, fp8, ...); "" if it can."""
    least = LEAST_CAPABILITY.get(precision)
    if device.type != "cuda" or least is None:
        return ""
    own = torch.cuda.get_device_capability(device)
    if own >= least:
        return ""
    needs = f"{precision} needs a GPU of compute capability {'.'.join(map(str, least))} or more"
    return f"{needs}, and {torch.cuda.get_device_name(device)} has {'.'.join(map(str, own))}"


def agree(own: Place, launch: Launch, store: dist.Store) -> int:
    """Compares the places of all ranks, and returns the number of ranks that share this rank's cores. Collective.

    Raises UsageError on every rank if `fault_of` finds a fault.
    """
    key = "places/{}".format
    if launch.rank:
        store.set(key(launch.rank), json.dumps(asdict(own)))
    else:
        others = [parse_json(store.get(key(rank))) for rank in range(1, launch.world_size)]
        places = [own, *(Place(**{**other, "cores": tuple(other["cores"])}) for other in others)]
        store.set(key("verdict"), json.dumps([fault_of(places), core_sharers(places)]))
    fault, sharers = parse_json(store.get(key("verdict")))
    if launch.rank:
        store.set(key(f"read/{launch.rank}"), "")
    elif fault:  # The store ends with this process: the others need time to read.
        store.wait([key(f"read/{rank}") for rank in range(1, launch.world_size)])
    if fault:
        error = UsageError(fault)
        error.print_suppressed = not launch.prints_errors
        raise error
    return int(sharers[launch.rank])


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

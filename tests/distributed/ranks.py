"""Real ranks for tests: a function run in several processes over gloo, its values brought back."""

from __future__ import annotations

import faulthandler
import multiprocessing
import pickle
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.multiprocessing as mp
from stuck import fail_stuck, threads_of

from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.runtime import Runtime

# What deepspeed and FSDP2 import, which takes each process longer than most tests take. They are loaded once, in a
# server that the ranks are forked from. Not deepspeed itself: it looks for a card, and CUDA does not survive a fork.
PRELOADED = ("torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.fsdp", "torch.distributed.tensor")
LIMIT = 240.0
STACKS_BEFORE = 5.0  # Seconds before the limit at which ranks write down where they are.


def free_port() -> int:
    """A TCP port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(world_size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(runtime, *arguments)` on each of `world_size` processes; their return values in order of ranks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        multiprocessing.set_forkserver_preload(list(PRELOADED))
        each = (world_size, free_port(), folder, work, arguments)
        ranks = mp.start_processes(_rank, each, nprocs=world_size, join=False, start_method="forkserver")
        end = time.monotonic() + LIMIT
        while not ranks.join(timeout=max(0.0, end - time.monotonic())):
            if time.monotonic() > end:
                _fail(ranks, folder)
        return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(world_size)]


def _fail(ranks: mp.ProcessContext, folder: Path) -> NoReturn:
    living = [process for process in ranks.processes if process.is_alive()]
    kernel = threads_of(process.pid for process in living)
    for process in living:
        process.kill()
    stacks = "\n".join(file.read_text(errors="replace") for file in sorted(folder.glob("stacks-*")))
    fail_stuck(f"ranks did not end in {LIMIT} s\n{kernel}\n{stacks}")


def _rank(
    rank: int, world_size: int, port: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    stacks = (folder / f"stacks-{rank}").open("w")
    faulthandler.dump_traceback_later(LIMIT - STACKS_BEFORE, file=stacks)
    environ = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    runtime: Runtime = parallel_runtime.start(environ)
    value = work(runtime, *arguments)
    (folder / str(rank)).write_bytes(pickle.dumps(value))
    parallel_runtime.stop()
    faulthandler.cancel_dump_traceback_later()

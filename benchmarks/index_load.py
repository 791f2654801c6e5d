"""Seconds and memory to load the index of many samples: from index.json and from index.npz.

    python benchmarks/index_load.py --samples 1000000

Makes sparse shards of at most 1,000 samples in a temporary folder, and loads each form in a process of its own,
`--rounds` times; prints the medians. Seconds are of the CPU, so that other work on the machine counts less. No
index.npz is made for few samples: its row reports that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sfa_dist.data.shards.index_columns import SIDECAR_FROM, SIDECAR_NAME
from sfa_dist.data.shards.index_file import INDEX_NAME, to_raw, write_index
from sfa_dist.data.shards.shard_index import load_index
from sfa_dist.data.shards.shard_walk import SampleEntry, ShardEntry, TarMember

PER_SHARD = 1000


def make(folder: Path, samples: int) -> None:
    """Sparse shards and their index.json, of Kinetics-like keys."""
    shards = {}
    for number, first in enumerate(range(0, samples, PER_SHARD)):
        entries = []
        for row in range(min(PER_SHARD, samples - first)):
            start = 512 + row * 1_240_000
            members = {
                "cls": TarMember(start, 3, 123456789),
                "json": TarMember(start + 1024, 96, 3987654321),
                "mp4": TarMember(start + 2048, 1_234_567, 4012345678 - row),
            }
            key = f"class_{row % 400:03d}/v_{first + row:011x}_000010_000020"
            entries.append(SampleEntry(key, members, row % 400))
        size = 512 + PER_SHARD * 1_240_000 + 10240
        name = f"train-{number:06d}.tar"
        shards[name] = to_raw(ShardEntry(size, f"{number:064x}", tuple(entries)))
        with (folder / name).open("wb") as file:
            file.truncate(size)
    write_index(folder, shards)


def load_here(folder: Path) -> dict[str, float]:
    """Loads in this process: samples, CPU seconds, and MiB that stay and at the peak, above those before the load."""
    paths = sorted(folder.glob("*.tar"))
    before, start = _status("VmRSS"), time.process_time()
    index = load_index(paths)
    seconds = time.process_time() - start
    memory = {"resident": _status("VmRSS") - before, "peak": _status("VmHWM") - before}
    return {"samples": len(index), "seconds": seconds, **memory}


def _status(key: str) -> float:
    """MiB. Not getrusage, whose maximum a process inherits from the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(key)).split()[1]) / 1024


def measure(folder: Path, samples: int, keep_sidecar: bool, times: int) -> dict[str, float]:
    """Medians over fresh processes, each of which loads all samples."""
    rounds = []
    for _ in range(times):
        if not keep_sidecar:
            (folder / SIDECAR_NAME).unlink(missing_ok=True)
        command = [sys.executable, __file__, "--load", str(folder)]
        rounds.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert all(each["samples"] == samples for each in rounds), rounds
    return {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load_here(arguments.load)))
        return
    print(
        f"{arguments.samples} samples; {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    print("| | file | seconds | resident | peak |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder, arguments.samples)
        row(INDEX_NAME, folder / INDEX_NAME, measure(folder, arguments.samples, False, arguments.rounds))
        if arguments.samples < SIDECAR_FROM:
            print(f"| {SIDECAR_NAME} | none, below {SIDECAR_FROM} samples | - | - | - |")
        else:
            row(SIDECAR_NAME, folder / SIDECAR_NAME, measure(folder, arguments.samples, True, arguments.rounds))


def row(what: str, file: Path, found: dict[str, float]) -> None:
    """One line of the table."""
    size = file.stat().st_size / 2**20
    memory = f"{found['resident']:.0f} MiB | {found['peak']:.0f} MiB"
    print(f"| {what} | {size:.1f} MiB | {found['seconds']:.2f} | {memory} |", flush=True)


if __name__ == "__main__":
    main()

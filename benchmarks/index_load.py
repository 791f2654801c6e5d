"""Seconds and memory to load the index of many samples: from index.json and from index.npz.

    python benchmarks/index_load.py --samples 1000000

Makes sparse shards of 1,000 samples in a temporary folder, and loads each form in a process of its own, `--rounds`
times; prints the medians. Seconds are of the CPU, so that other work on the machine counts less.
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

from sfa_dist.data.shards.index_columns import SIDECAR_NAME
from sfa_dist.data.shards.index_file import INDEX_NAME, to_raw, write_index
from sfa_dist.data.shards.shard_index import load_index
from sfa_dist.data.shards.shard_walk import SampleEntry, ShardEntry, TarMember

PER_SHARD = 1000


def make(folder: Path, samples: int) -> None:
    """Sparse shards and their index.json, of Kinetics-like keys."""
    shards = {}
    for number in range(samples // PER_SHARD):
        entries = []
        for row in range(PER_SHARD):
            start = 512 + row * 1_240_000
            members = {
                "cls": TarMember(start, 3, 123456789),
                "json": TarMember(start + 1024, 96, 3987654321),
                "mp4": TarMember(start + 2048, 1_234_567, 4012345678 - row),
            }
            key = f"class_{row % 400:03d}/v_{number * PER_SHARD + row:011x}_000010_000020"
            entries.append(SampleEntry(key, members, row % 400))
        size = 512 + PER_SHARD * 1_240_000 + 10240
        name = f"train-{number:06d}.tar"
        shards[name] = to_raw(ShardEntry(size, f"{number:064x}", tuple(entries)))
        with (folder / name).open("wb") as file:
            file.truncate(size)
    write_index(folder, shards)


def load_here(folder: Path) -> dict[str, float]:
    """Loads in this process: seconds of CPU, MiB that stay and MiB at the peak, above what the program took before."""
    paths = sorted(folder.glob("*.tar"))
    before, start = _status("VmRSS"), time.process_time()
    index = load_index(paths)
    seconds = time.process_time() - start
    assert len(index) == len(paths) * PER_SHARD
    return {"seconds": seconds, "resident": _status("VmRSS") - before, "peak": _status("VmHWM") - before}


def _status(key: str) -> float:
    """MiB. Not getrusage, whose maximum a process inherits from the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(key)).split()[1]) / 1024


def measure(folder: Path, keep_sidecar: bool, times: int) -> dict[str, float]:
    """Medians over fresh processes."""
    rounds = []
    for _ in range(times):
        if not keep_sidecar:
            (folder / SIDECAR_NAME).unlink(missing_ok=True)
        command = [sys.executable, __file__, "--load", str(folder)]
        rounds.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
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
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder, arguments.samples)
        row("index.json", folder / INDEX_NAME, measure(folder, False, arguments.rounds))
        row("index.npz", folder / SIDECAR_NAME, measure(folder, True, arguments.rounds))


def row(what: str, file: Path, found: dict[str, float]) -> None:
    """One line of the table."""
    size = file.stat().st_size / 2**20
    print(
        f"| {what} | {size:.0f} MiB | {found['seconds']:.1f} | {found['resident']:.0f} MiB | {found['peak']:.0f} MiB |",
        flush=True,
    )


if __name__ == "__main__":
    main()

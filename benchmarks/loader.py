"""Reading the feature cache: our stream against plain reading of the same shards, interleaved, on this machine.

    python benchmarks/loader.py --clips 2000 --width 1024 --frames 128 --video-frames 300

`bytes` reads the files from end to end, `webdataset` takes the samples apart with the stock library (no decoding, no
check), `stream` is the training stream: random order, crc32 of each sample, the clip's rows cut out, batches of
`--batch`. Features are random numbers; their size is that of a recipe's.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import webdataset as wds

from sfa_dist.data.feature_grid import StepGrid
from sfa_dist.data.feature_shards import PartWriter, begin_view, close_view, plan_parts
from sfa_dist.data.feature_stream import CachedSplit, feature_train_loader
from sfa_dist.data.shard_index import SampleIndex
from sfa_dist.recipe_blocks import AugmentBlock, BatchBlock, CacheBlock, DataBlock

SHARD = 1000


def make_index(clips: int) -> SampleIndex:
    """An index as of `clips` videos in shards of 1,000; nothing is behind it."""
    shards = -(-clips // SHARD)
    numbers = np.arange(clips, dtype=np.int64)
    return SampleIndex(
        shards=tuple(Path(f"train-{shard:06d}.tar") for shard in range(shards)),
        shard_sha256=tuple("" for _ in range(shards)),
        shard=numbers // SHARD,
        offset=np.full(clips, -1, dtype=np.int64),
        size=np.zeros(clips, dtype=np.int64),
        crc32=np.zeros(clips, dtype=np.int64),
        label=numbers % 400,
        keys=[f"{number:08d}" for number in numbers],
        suffix=["mp4"] * clips,
    )


def make_cache(folder: Path, index: SampleIndex, grid: StepGrid, width: int, video_frames: int) -> CachedSplit:
    """One view of random features."""
    view = folder / "view-00"
    begin_view(view, {})
    parts = plan_parts(index, 0)
    features = torch.randn(grid.num_steps(video_frames), width).bfloat16()
    for part in parts:
        writer = PartWriter(view, part, index, {})
        for sample in part.samples:
            writer.add(sample, features, video_frames)
        writer.finish(0.0)
    close_view(view, parts, {"version": 1, "classes": None, "key": {}, "trunk_sha256": ""}, 1)
    return CachedSplit((view,), width, torch.bfloat16)


def read_bytes(shards: list[Path]) -> int:
    """Every byte, a mebibyte at a time."""
    total = 0
    for shard in shards:
        with shard.open("rb", buffering=0) as file:
            while chunk := file.read(1 << 20):
                total += len(chunk)
    return total


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--video-frames", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write the shards (default: a temporary folder)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        grid, index = StepGrid(2, 2, 1), make_index(arguments.clips)
        split = make_cache(Path(folder), index, grid, arguments.width, arguments.video_frames)
        shards = sorted(split.folders[0].glob("*.tar"))
        size = sum(shard.stat().st_size for shard in shards)
        cache, batch = CacheBlock(views=1), BatchBlock(size=64, micro=arguments.batch)

        def stream(workers: int) -> int:
            data = DataBlock(stride=2, workers=workers)
            common = {"frames": arguments.frames, "crop": 224, "seed": 0, "epoch": 0}
            loader = feature_train_loader(index, split, grid, cache, data, AugmentBlock(), batch, **common)
            return sum(int((each["weights"] > 0).sum()) for each in loader)

        ways: dict[str, Callable[[], int]] = {
            "bytes": lambda: read_bytes(shards),
            "webdataset": lambda: sum(1 for _ in wds.WebDataset(list(map(str, shards)), shardshuffle=False)),
        }
        for workers in arguments.workers:
            ways[f"stream, {workers} workers"] = lambda workers=workers: stream(workers)  # type: ignore[misc]
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(arguments.rounds + 1):
            for name, work in ways.items():
                started = time.perf_counter()
                work()
                if number:  # The first round fills the page cache.
                    seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; ", end=""
    )
    print(
        f"{arguments.clips} clips, {size / arguments.clips / 1024:.0f} KiB each, page cache; {arguments.rounds} rounds"
    )
    print(f"{'way':22} {'clips/s':>9} {'MiB/s':>8} {'of webdataset':>14} {'spread':>7}")
    for name, median in medians.items():
        spread = (max(seconds[name]) - min(seconds[name])) / median
        ratio = medians["webdataset"] / median
        print(f"{name:22} {arguments.clips / median:9.0f} {size / 2**20 / median:8.0f} {ratio:14.2f} {spread:7.0%}")


if __name__ == "__main__":
    main()

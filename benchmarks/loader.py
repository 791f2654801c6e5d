"""Reading: samples a second for each loader process, against plain reading of the same shards and against the step.

    python benchmarks/loader.py                                       # the feature cache of an L_128f
    python benchmarks/loader.py --clips 2000 --width 1024 --frames 128 --video-frames 300 --batch 8
    python benchmarks/loader.py --videos 64 --frames 32               # videos too, through every decoder there is

`bytes` reads the files from end to end, `webdataset` takes the samples apart with the stock library (no decoding, no
check), `stream` is the training stream: random order, crc32 of each sample, the clip's rows cut out, batches of
`--batch`; videos are decoded and augmented. Features are random numbers; their size is that of a recipe's.

Times are of the clock: loader processes work beside this one. `cpu` is what a clip takes of all processes together.
"""

from __future__ import annotations

import argparse
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from common import add_options, interleave, median_ratio, medians, report, spread, tree_clock, wall_clock
from decode import make_video

from sfa_dist.data.decode import choose_decoder
from sfa_dist.data.feature_grid import StepGrid
from sfa_dist.data.feature_shards import PartWriter, begin_view, close_view, plan_parts
from sfa_dist.data.feature_stream import CachedSplit, feature_train_loader
from sfa_dist.data.loader import Loader
from sfa_dist.data.pack import pack
from sfa_dist.data.shard_index import SampleIndex, load_index
from sfa_dist.data.stream import train_loader
from sfa_dist.errors import RecipeError
from sfa_dist.recipe_blocks import AugmentBlock, BatchBlock, CacheBlock, DataBlock

SHARD = 1000
COLUMNS = ("way", "clips/s", "a worker", "MiB/s", "of webdataset", "cpu ms a clip", "spread")


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


def make_videos(folder: Path, count: int) -> SampleIndex:
    """Packs one generated video of 10 s `count` times; a box that means nothing makes each file another one, as copies
    are packed once."""
    (folder / "clips" / "one").mkdir(parents=True)
    video = make_video()
    for number in range(count):
        (folder / "clips" / "one" / f"{number:05d}.mp4").write_bytes(video + struct.pack(">I4sQ", 16, b"free", number))
    pack(folder / "clips", folder / "shards")
    index = load_index(sorted((folder / "shards").glob("*.tar")))
    assert len(index) == count, f"{len(index)} of {count} videos were packed"
    return index


def read_bytes(shards: list[Path]) -> int:
    """Every byte, a mebibyte at a time."""
    total = 0
    for shard in shards:
        with shard.open("rb", buffering=0) as file:
            while chunk := file.read(1 << 20):
                total += len(chunk)
    return total


def plain_ways(shards: list[Path]) -> dict[str, Callable[[], int]]:
    """What others make of the same files."""
    urls = [str(shard) for shard in shards]
    return {
        "bytes": lambda: read_bytes(shards),
        "webdataset": lambda: sum(1 for _ in wds.WebDataset(urls, shardshuffle=False)),
    }


def drain(make: Callable[[], Loader], clips: int) -> int:
    """Reads one epoch; a benchmark of less than the whole would flatter."""
    seen = sum(int((batch["weights"] > 0).sum()) for batch in make())
    assert seen == clips, f"{seen} of {clips} clips came"
    return seen


def feature_ways(arguments: argparse.Namespace, index: SampleIndex, split: CachedSplit, grid: StepGrid) -> dict:
    """The training stream over stored features, by the number of loader processes."""
    batch = BatchBlock(size=64, micro=arguments.batch)

    def make(workers: int) -> Loader:
        data = DataBlock(stride=2, workers=workers)
        common = {"frames": arguments.frames, "crop": 224, "seed": 0, "epoch": 0}
        return feature_train_loader(index, split, grid, CacheBlock(views=1), data, AugmentBlock(), batch, **common)

    return {
        f"stream, {workers} workers": lambda workers=workers: drain(lambda: make(workers), arguments.clips)
        for workers in arguments.workers
    }


def video_ways(arguments: argparse.Namespace, index: SampleIndex) -> dict[str, Callable[[], int]]:
    """The training stream over videos, by decoder and number of loader processes."""
    found: dict[str, Callable[[], int]] = {}
    batch = BatchBlock(size=arguments.batch, micro=arguments.batch)
    for decoder in ("torchcodec", "pyav"):
        try:
            choose_decoder(decoder)
        except RecipeError as error:
            print(f"without {decoder}: {error}")
            continue
        for workers in arguments.workers:
            data = DataBlock(stride=2, workers=workers, decoder=decoder)
            common = {"frames": arguments.frames, "crop": 224, "seed": 0, "epoch": 0}

            def make(data: DataBlock = data, common: dict = common) -> Loader:
                return train_loader(index, data, AugmentBlock(), batch, **common)

            found[f"{decoder}, {workers} workers"] = lambda make=make: drain(make, len(index))
    return found


def show(arguments: argparse.Namespace, title: str, ways: dict, clips: int, size: int) -> None:
    """Measures the ways and prints the table. Clock and processor are read in the same rounds."""
    cpu: dict[str, list[float]] = {name: [] for name in ways}

    def counted(name: str) -> Callable[[], None]:
        def work() -> None:
            before = tree_clock()
            ways[name]()
            cpu[name].append(tree_clock() - before)

        return work

    seconds = interleave({name: counted(name) for name in ways}, arguments.rounds, clock=wall_clock)
    rows = []
    for name, median in medians(seconds).items():
        workers = int(name.split()[-2]) if name.endswith("workers") else 0
        taken = medians({name: cpu[name][1:]})[name]
        rows.append(
            [
                name,
                clips / median,
                clips / median / max(1, workers),
                size / 2**20 / median,
                1 / median_ratio(seconds[name], seconds["webdataset"]),
                1000 * taken / clips,
                f"{spread(seconds[name]):.0%}",
            ]
        )
    report(arguments, title, COLUMNS, rows, seconds=seconds, cpu=cpu)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--videos", type=int, default=0, help="read this many videos instead of features")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--video-frames", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--folder", type=Path, help="where to write the shards (default: a temporary folder)")
    add_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        if arguments.videos:
            index, kind = make_videos(folder, arguments.videos), "videos"
            shards = sorted((folder / "shards").glob("*.tar"))
            ways, clips = video_ways(arguments, index), len(index)
        else:
            grid, index, clips, kind = StepGrid(2, 2, 1), make_index(arguments.clips), arguments.clips, "features"
            split = make_cache(folder, index, grid, arguments.width, arguments.video_frames)
            shards = sorted(split.folders[0].glob("*.tar"))
            ways = feature_ways(arguments, index, split, grid)
        size = sum(shard.stat().st_size for shard in shards)
        title = f"{clips} {kind}, {size / clips / 1024:.0f} KiB each, in the page cache; clips of {arguments.frames} "
        title += f"frames, batches of {arguments.batch}; medians of {arguments.rounds} interleaved rounds"
        show(arguments, title, plain_ways(shards) | ways, clips, size)


if __name__ == "__main__":
    main()

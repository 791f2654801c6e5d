"""Reading: samples a second for each loader process, against plain reading of the same shards and against the step.

    python benchmarks/loader.py                                       # the feature cache of an L_128f
    python benchmarks/loader.py --clips 2000 --video-frames 300 --batch 8 --set model.temporal_depth=4
    python benchmarks/loader.py --videos 64 --recipe recipes/b_32f.yaml   # videos, through every decoder there is

`bytes` reads the files from end to end, `webdataset` takes the samples apart with the stock library (no decoding, no
check), `stream` is the training stream: random order, crc32 of each sample, the clip's rows cut out, batches of
`--batch`; videos are decoded and augmented. Features are random numbers; width and frames are those of the recipe's
stage 2.

Times are of the clock: loader processes work beside this one. `cpu` is what a clip takes of all processes together.
`of a step` is what reading takes of the time of the optimizer step that it is for, clip by clip, in the same rounds:
stage 2 from features for features, with a live trunk for videos. Without workers that comes on top of a step; with
them it is done beside it, and a step waits from 1 on. Both by the clock where a GPU makes the step; on a CPU, by the
processor, of which there is one for both.
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
from common import (
    ROOT,
    Cell,
    add_options,
    interleave,
    median_ratio,
    medians,
    report,
    script,
    spread,
    tree_clock,
    wall_clock,
)
from decode import make_video
from step import CACHED, LIVE, make_step

from sfa_dist.data.batches.loader import Loader
from sfa_dist.data.batches.planned import LoaderSettings
from sfa_dist.data.batches.stream import train_loader
from sfa_dist.data.features.feature_grid import StepGrid
from sfa_dist.data.features.feature_shards import PartWriter, begin_view, close_view, plan_parts
from sfa_dist.data.features.feature_stream import CachedSplit, feature_train_loader
from sfa_dist.data.packing.pack import pack
from sfa_dist.data.shards.shard_index import SampleIndex, load_index
from sfa_dist.data.video.decode import choose_decoder
from sfa_dist.errors import RecipeError
from sfa_dist.models.vivit import dims_of
from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.environment import environment
from sfa_dist.recipe.blocks import AugmentBlock, BatchBlock, CacheBlock, DataBlock
from sfa_dist.recipe.schema import Stage2, load_recipe

SHARD = 1000
COLUMNS = ("way", "clips/s", "a worker", "MiB/s", "of webdataset", "cpu ms a clip", "of a step", "spread")
STEP = "step"


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
    seen = sum(int((batch.weights > 0).sum()) for batch in make())
    assert seen == clips, f"{seen} of {clips} clips came"
    return seen


def feature_ways(
    arguments: argparse.Namespace, stage: Stage2, index: SampleIndex, split: CachedSplit, grid: StepGrid
) -> dict[str, Callable[[], int]]:
    """The training stream over stored features, by the number of loader processes."""
    batch = BatchBlock(size=64, micro=arguments.batch)

    def make(workers: int) -> Loader:
        data = DataBlock(stride=stage.data.stride, workers=workers)
        settings = LoaderSettings(data, batch, AugmentBlock(), stage.frames, 224)
        return feature_train_loader(index, split, grid, CacheBlock(views=1), settings, epoch=0)

    return {
        f"stream, {workers} workers": lambda workers=workers: drain(lambda: make(workers), arguments.clips)
        for workers in arguments.workers
    }


def video_ways(arguments: argparse.Namespace, stage: Stage2, index: SampleIndex) -> dict[str, Callable[[], int]]:
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
            data = DataBlock(stride=stage.data.stride, workers=workers, decoder=decoder)
            settings = LoaderSettings(data, batch, AugmentBlock(), stage.frames, 224)

            def make(settings: LoaderSettings = settings) -> Loader:
                return train_loader(index, settings, epoch=0)

            found[f"{decoder}, {workers} workers"] = lambda make=make: drain(make, len(index))
    return found


def show(arguments: argparse.Namespace, title: str, ways: dict, clips: int, size: int) -> None:
    """Measures the ways, all but STEP over `clips` clips, and prints the table. Clock and processor are read in the
    same rounds."""
    cpu: dict[str, list[float]] = {name: [] for name in ways}

    def counted(name: str) -> Callable[[], None]:
        def work() -> None:
            before = tree_clock()
            ways[name]()
            cpu[name].append(tree_clock() - before)

        return work

    seconds = interleave({name: counted(name) for name in ways}, arguments.rounds, clock=wall_clock)
    cpu = {name: taken[1:] for name, taken in cpu.items()}  # The first round is a warm-up.
    compared = seconds if torch.cuda.is_available() else cpu
    step = [taken * clips / arguments.batch for taken in compared[STEP]]
    rows: list[list[Cell]] = []
    for name, median in medians(seconds).items():
        apart = f"{spread(seconds[name]):.0%}"
        if name == STEP:
            each = 1000 * medians(cpu)[STEP] / arguments.batch
            rows.append([name, arguments.batch / median, None, None, None, each, 1.0, apart])
            continue
        workers = int(name.split()[-2]) if name.endswith("workers") else 0
        speeds = [clips / median, clips / median / max(1, workers), size / 2**20 / median]
        shares = [1 / median_ratio(seconds[name], seconds["webdataset"]), median_ratio(compared[name], step)]
        rows.append([name, *speeds, shares[0], 1000 * medians(cpu)[name] / clips, shares[1], apart])
    report(arguments, title, COLUMNS, rows, seconds=seconds, cpu=cpu)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "l_128f.yaml")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--videos", type=int, default=0, help="read this many videos instead of features")
    parser.add_argument("--video-frames", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--folder", type=Path, help="where to write the shards (default: a temporary folder)")
    add_options(parser)
    arguments = parser.parse_args()
    runtime = parallel_runtime.start(environment())
    torch.set_num_threads(1)
    batch = [f"batch={{size: {arguments.batch}, micro: {arguments.batch}}}", "engine.zero=0"]
    recipe = load_recipe(arguments.recipe, [*batch, *arguments.set], environment()).recipe
    stage = recipe.stage2
    assert stage is not None, "the recipe has no stage2"
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        if arguments.videos:
            index, kind, way = make_videos(folder, arguments.videos), "videos", LIVE
            shards = sorted((folder / "shards").glob("*.tar"))
            ways, clips = video_ways(arguments, stage, index), len(index)
        else:
            index, clips, kind, way = make_index(arguments.clips), arguments.clips, "features", CACHED
            grid = StepGrid(stage.model.tubelet, stage.data.stride, 1)
            split = make_cache(folder, index, grid, dims_of(stage.model).width, arguments.video_frames)
            shards = sorted(split.folders[0].glob("*.tar"))
            ways = feature_ways(arguments, stage, index, split, grid)
        ways = {**plain_ways(shards), **ways, STEP: make_step(way, recipe, arguments.batch, runtime)}
        size = sum(shard.stat().st_size for shard in shards)
        title = f"{clips} {kind}, {size / clips / 1024:.0f} KiB each, in the page cache; clips of {stage.frames} "
        title += f"frames, batches of {arguments.batch}, step: {recipe.name}'s stage 2, {way}"
        show(arguments, f"{title}; medians of {arguments.rounds} interleaved rounds", ways, clips, size)
    parallel_runtime.stop()


if __name__ == "__main__":
    script(main)

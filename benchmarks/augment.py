"""What augmenting one clip costs on one thread, by size of the stored frames: no decoding, no batches.

    python benchmarks/augment.py --rounds 7

A training view is resized twice where `augment.resize` is `official` and there is scale jitter, otherwise once.
Colour is brightness, saturation, contrast and hue. `4 x 3 test views` are twelve crops of four clips, each resized
once. Times are of the processor, medians over rounds in which the ways take turns; all draw the same samples.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import count

import torch
from common import add_options, interleave, medians, report, script, spread

from sfa_dist.data.batches.augment import SpatialViews, TrainView
from sfa_dist.data.batches.resizing import packed
from sfa_dist.data.sampling.randomness import sample_rng
from sfa_dist.recipe.blocks import AugmentBlock

SIZES = {"340 x 256": (256, 340, 256, 224), "320 x 240": (240, 320, 256, 224), "32 x 32": (32, 32, 36, 32)}
PLAIN = {"color": 0.0, "gray": 0.0}
TRAINING = {
    "resize and crop": AugmentBlock(**PLAIN),
    "resize and crop, no jitter": AugmentBlock(**PLAIN, scale_jitter=None),
    "resize and crop, antialias": AugmentBlock(**PLAIN, resize="antialias"),
    "resize, crop and colour": AugmentBlock(color=1.0, gray=0.0),
    "resize, crop, colour and grey": AugmentBlock(color=1.0, gray=1.0),
}
SLICE = 8  # Frames that a decoder hands on at a time.


def shrunk(clip: torch.Tensor, shrink: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The frames of a clip, uint8 (T, H, W, 3), each after `shrink`, which is given a few at a time."""
    return torch.cat([shrink(part) for part in clip.split(SLICE)])


def training_way(clip: torch.Tensor, resize: int, crop: int, augment: AugmentBlock) -> Callable[[], object]:
    """One training view, of another sample each time."""
    samples = count()

    def work() -> None:
        view = TrainView(resize, crop, augment, sample_rng(0, 0, next(samples), "augment"))
        view.finish(shrunk(clip, view.shrink))

    return work


def test_way(clip: torch.Tensor, resize: int, crop: int) -> Callable[[], object]:
    """Four temporal views of three spatial ones."""
    views = SpatialViews(resize, crop, views=3)

    def work() -> None:
        for _ in range(4):
            small = shrunk(clip, views.shrink)
            for number in range(3):
                packed(views.cut(small, number))

    return work


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=32)
    add_options(parser, rounds=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways: dict[tuple[str, str], Callable[[], object]] = {}
    for name, (height, width, resize, crop) in SIZES.items():
        generator = torch.Generator().manual_seed(0)
        clip = torch.randint(0, 256, (arguments.frames, height, width, 3), dtype=torch.uint8, generator=generator)
        for way, augment in TRAINING.items():
            ways[name, way] = training_way(clip, resize, crop, augment)
        ways[name, "4 x 3 test views"] = test_way(clip, resize, crop)
    seconds = interleave(ways, arguments.rounds)
    rows = [[*key, 1000 * median, f"{spread(seconds[key]):.0%}"] for key, median in medians(seconds).items()]
    title = f"{arguments.frames} frames of noise, one thread; medians of {arguments.rounds} interleaved rounds"
    report(arguments, title, ["stored", "way", "cpu ms", "spread"], rows)


if __name__ == "__main__":
    script(main)

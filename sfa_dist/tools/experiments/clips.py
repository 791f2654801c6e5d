"""The clips of the small scales: two sets of moving digits, and one of still digits for the image checkpoint.

The first set is that of `demo_data.py`. The second one differs in all that a data set may differ in: dark digits on a
light ground, diagonal directions, and other digits that share a label.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path

import numpy as np

from sfa_dist.tools import demo_data
from sfa_dist.tools.demo_data import Pixels
from sfa_dist.tools.experiments.scales import ClipCounts

DIAGONALS = {"down-right": (1, 1), "down-left": (1, -1), "up-right": (-1, 1), "up-left": (-1, -1)}
PAIRS = 5
SEEDS = {"train": 5, "test": 6}
STAMP = "made"


def other_clips(count: int, train: bool, seed: int, frames: int) -> Iterator[tuple[str, Pixels]]:
    """Yields (label name, frames) of the second set: dark digits, 2k and 2k + 1 alike, that move diagonally."""
    images, classes = demo_data.digit_images()
    chosen = slice(0, demo_data.TRAIN_DIGITS) if train else slice(demo_data.TRAIN_DIGITS, None)
    images, classes = images[chosen], classes[chosen]
    rng, names = np.random.default_rng(seed), list(DIAGONALS)
    for number in range(count):
        which, direction = rng.integers(len(images)), names[number % len(names)]
        dy, dx = (int(rng.integers(1, 3)) * sign for sign in DIAGONALS[direction])
        pair = classes[which] // 2
        yield f"{2 * pair}or{2 * pair + 1}_{direction}", 255 - demo_data.render(images[which], (dy, dx), frames, rng)


def make_first(folder: Path, counts: ClipCounts) -> None:
    """Makes the first set, and the images, in place of what is in `folder`."""
    demo_data.make(folder, counts.train, counts.test, counts.images, counts.frames)


def make_other(folder: Path, counts: ClipCounts) -> None:
    """Makes the second set, in place of what is in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    labels = sorted(f"{2 * pair}or{2 * pair + 1}_{name}" for pair in range(PAIRS) for name in DIAGONALS)
    for name, count in (("train", counts.train), ("test", counts.test)):
        clips = other_clips(count, name == "train", SEEDS[name], counts.frames)
        demo_data.write_split(folder, name, clips, labels)
    shutil.rmtree(folder / "raw")


def make_clips(folder: Path, counts: ClipCounts, make: Callable[[Path, ClipCounts], None]) -> bool:
    """Makes a set in `folder`, unless it is there in this size; whether it made it."""
    stamp, wanted = folder / STAMP, " ".join(map(str, astuple(counts))) + "\n"
    if stamp.is_file() and stamp.read_text() == wanted:
        return False
    make(folder, counts)
    stamp.write_text(wanted)
    return True

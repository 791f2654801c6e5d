"""A small set of videos whose two classes are one motion, played forward and backward: single frames show nothing.

    python benchmarks/reversed_motion.py --out data/reversed

Handwritten digits (scikit-learn's) go round on bent paths over still backgrounds. Every path is drawn twice, in its
order and reversed, so the classes differ in the direction of rotation and in nothing else. Paths, backgrounds and
digits of the test are others than those of the training. Writes mp4 files and list.csv, which `sfa pack` reads.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import common  # noqa: F401 (it puts the repository's root on the path)
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from sfa_dist.tools.demo_data import TRAIN_DIGITS, digit_images, write_video

SIDE, FRAMES, FPS = 96, 16, 15
PATHS = {"train": 113, "test": 40}
LABELS = ("clockwise", "counter_clockwise")
Floats = NDArray[np.float32]


def path(rng: np.random.Generator) -> NDArray[np.float64]:
    """The centres (FRAMES, 2) as x, y of an object that goes round clockwise on the screen, in pixels."""
    turns, begin = rng.uniform(0.6, 1.4), rng.uniform(0, 2 * np.pi)
    angles = begin + np.linspace(0, 2 * np.pi * turns, FRAMES) + rng.normal(0, 0.05, FRAMES)
    bend, phase = rng.uniform(0, 0.2), rng.uniform(0, 2 * np.pi)
    radii = SIDE * rng.uniform(0.12, 0.28) * (1 + bend * np.sin(2 * angles + phase))
    middle = rng.uniform(0.38, 0.62, 2) * SIDE
    return middle + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def ground(rng: np.random.Generator) -> Floats:
    """A background (SIDE, SIDE, 3) from 0 to 1: noise in four octaves and colours."""
    octaves = [torch.from_numpy(rng.uniform(0, 1, (1, 3, cells, cells))).float() for cells in (2, 5, 12, 30)]
    sides = [F.interpolate(noise, size=(SIDE, SIDE), mode="bilinear", align_corners=True) for noise in octaves]
    mixed = sum(share * side for share, side in zip((0.4, 0.3, 0.2, 0.1), sides, strict=True))
    return np.ascontiguousarray(torch.as_tensor(mixed)[0].permute(1, 2, 0).numpy())


def draw(centres: NDArray[np.float64], digit: Floats, scene: Floats, colour: Floats) -> NDArray[np.uint8]:
    """The video (FRAMES, SIDE, SIDE, 3): `digit` (16, 16) in `colour` at each of `centres`."""
    frames = np.repeat(scene[None], len(centres), axis=0).copy()
    for frame, (x, y) in zip(frames, centres, strict=True):
        top, left = (int(np.clip(round(value) - 8, 0, SIDE - 16)) for value in (y, x))
        part = frame[top : top + 16, left : left + 16]
        part += (colour - part) * digit[..., None]
    return (frames * 255 + 0.5).astype(np.uint8)


def make(out: Path, seed: int = 0, paths: dict[str, int] | None = None) -> None:
    """Writes two videos a path, and list.csv. Raises FileExistsError where `out` exists."""
    out.mkdir(parents=True)
    images, _ = digit_images()
    rows = []
    for split, count in (paths or PATHS).items():
        rng = np.random.default_rng([seed, split == "test"])
        digits = images[:TRAIN_DIGITS] if split == "train" else images[TRAIN_DIGITS:]
        for number in range(count):
            centres, scene = path(rng), ground(rng)
            digit, colour = digits[rng.integers(len(digits))], rng.uniform(0, 1, 3).astype(np.float32)
            for label, way in zip(LABELS, (centres, centres[::-1]), strict=True):
                name = f"{split}_{number:03d}_{label}.mp4"
                write_video(out / name, draw(way, digit, scene, colour), FPS)
                rows.append((name, label, split))
    with (out / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])


def main() -> None:
    """Makes the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    arguments = parser.parse_args()
    make(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()

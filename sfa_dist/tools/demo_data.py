"""A small real video set: scikit-learn's handwritten digits moving over backgrounds.

    python -m sfa_dist.tools.demo_data --out data/demo

The label depends on the digit and on its motion: (digit mod 5) x direction, 20 classes. A single frame shows the digit
but not the direction, so a model that cannot use time stays near 1/4. The image set (ten classes, digits at random
positions) trains an image checkpoint that knows appearance and no motion. Of the 1,797 digits, 0 to 1299 are for
training and the rest for the test.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from sfa_dist.data.packing.pack import pack
from sfa_dist.data.packing.pack_settings import PackSettings

FRAME, DIGIT, FRAMES, FPS = 32, 16, 16, 10
DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
GROUPS = 5
TRAIN_DIGITS = 1300
Pixels = NDArray[np.uint8]


def digit_images() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """scikit-learn's 8x8 digits enlarged to 16x16, values 0 to 1, and their classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)
    return images.repeat(DIGIT // 8, axis=1).repeat(DIGIT // 8, axis=2), digits.target.astype(np.int64)


def background(rng: np.random.Generator) -> NDArray[np.float32]:
    """A smooth random texture (FRAME, FRAME, 3) between 0 and 0.35."""
    coarse = rng.random((5, 5, 3)).astype(np.float32)
    positions = np.linspace(0, 3.999, FRAME)
    low, share = positions.astype(int), (positions % 1)[:, None, None].astype(np.float32)
    rows = coarse[low] * (1 - share) + coarse[low + 1] * share
    columns = rows[:, low] * (1 - share.transpose(1, 0, 2)) + rows[:, low + 1] * share.transpose(1, 0, 2)
    return columns * 0.35


def render(digit: NDArray[np.float32], step: tuple[int, int], frames: int, rng: np.random.Generator) -> Pixels:
    """Draws a digit that moves `step` pixels (down, right) a frame over a background, wraps around, and has noise.

    Returns uint8 (frames, FRAME, FRAME, 3).
    """
    scene = background(rng)
    canvas = np.zeros((FRAME, FRAME), np.float32)
    canvas[:DIGIT, :DIGIT] = digit
    start = rng.integers(0, FRAME, 2)
    tint = rng.uniform(0.7, 1.0, 3).astype(np.float32)
    out = np.empty((frames, FRAME, FRAME, 3), np.uint8)
    for t in range(frames):
        mask = np.roll(canvas, (start[0] + step[0] * t, start[1] + step[1] * t), axis=(0, 1))[..., None]
        frame = scene * (1 - mask) + tint * mask + rng.normal(0, 0.03, scene.shape).astype(np.float32)
        out[t] = (frame.clip(0, 1) * 255).astype(np.uint8)
    return out


def write_video(path: Path, frames: Pixels, fps: int = FPS) -> None:
    """Writes RGB frames (T, H, W, 3) as an h264 mp4 with a key frame every 12 frames, as `sfa pack --gop 12` does.

    The bytes are the same on each call.
    """
    # For so small a picture x264's assembly code reads uninitialised memory, and its output varies between calls.
    options = {"crf": "16", "preset": "veryfast", "g": "12", "x264-params": "no-asm=1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def motion_clips(count: int, train: bool, seed: int, frames: int = FRAMES) -> Iterator[tuple[str, Pixels]]:
    """Yields (label name, `frames` frames) of moving digits."""
    images, classes = digit_images()
    chosen = slice(0, TRAIN_DIGITS) if train else slice(TRAIN_DIGITS, None)
    images, classes = images[chosen], classes[chosen]
    rng = np.random.default_rng(seed)
    names = list(DIRECTIONS)
    for number in range(count):
        which = rng.integers(len(images))
        direction = names[number % len(names)]
        speed = int(rng.integers(2, 4))
        dy, dx = DIRECTIONS[direction]
        label = f"{classes[which] % GROUPS}or{classes[which] % GROUPS + GROUPS}_{direction}"
        yield label, render(images[which], (dy * speed, dx * speed), frames, rng)


def image_clips(count: int, train: bool, seed: int) -> Iterator[tuple[str, Pixels]]:
    """Yields (digit name, one frame twice) of digits at random positions: an image set in the form of clips."""
    images, classes = digit_images()
    chosen = slice(0, TRAIN_DIGITS) if train else slice(TRAIN_DIGITS, None)
    images, classes = images[chosen], classes[chosen]
    rng = np.random.default_rng(seed)
    for _ in range(count):
        which = rng.integers(len(images))
        yield f"digit{classes[which]}", render(images[which], (0, 0), 1, rng).repeat(2, axis=0)


def write_split(out: Path, name: str, clips: Iterator[tuple[str, Pixels]], classes: list[str]) -> None:
    """Writes the clips as mp4 files with a csv, packs them into shards under `out/name`, and removes the files."""
    raw = out / "raw" / name
    raw.mkdir(parents=True)
    class_file = raw / "classes.txt"
    class_file.write_text("\n".join(classes) + "\n")
    with (raw / "clips.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        for number, (label, frames) in enumerate(clips):
            write_video(raw / f"{number:05d}.mp4", frames)
            writer.writerow([f"{number:05d}.mp4", label])
    settings = PackSettings(prefix=name, shard_size=500, classes=class_file, workers=2)
    pack(raw / "clips.csv", out / name, settings)
    shutil.rmtree(raw)


def make(out: Path, train_clips: int, test_clips: int, image_clips_count: int, frames: int = FRAMES) -> None:
    """Makes the whole set under `out`, in place of what is there: train, test, image_train, image_test.

    `frames` is the length of a video with motion.
    """
    motion = sorted(f"{g}or{g + GROUPS}_{d}" for g in range(GROUPS) for d in DIRECTIONS)
    digits = [f"digit{d}" for d in range(10)]
    shutil.rmtree(out, ignore_errors=True)
    write_split(out, "train", motion_clips(train_clips, True, 1, frames), motion)
    write_split(out, "test", motion_clips(test_clips, False, 2, frames), motion)
    write_split(out, "image_train", image_clips(image_clips_count, True, seed=3), digits)
    write_split(out, "image_test", image_clips(max(100, image_clips_count // 8), False, seed=4), digits)
    shutil.rmtree(out / "raw")


def main() -> None:
    """Makes the set, unless it exists in this size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("data/demo"), help="a folder, which is replaced (default: %(default)s)")
    add("--train-clips", type=int, default=4000, help="videos to train on (default: %(default)s)")
    add("--test-clips", type=int, default=800, help="videos to test on (default: %(default)s)")
    add("--image-clips", type=int, default=6000, help="images to train on (default: %(default)s)")
    arguments = parser.parse_args()
    size = f"{arguments.train_clips} {arguments.test_clips} {arguments.image_clips}\n"
    stamp = arguments.out / "made"
    if stamp.is_file() and stamp.read_text() == size:
        print(f"{arguments.out}: already exists in this size")
        return
    make(arguments.out, arguments.train_clips, arguments.test_clips, arguments.image_clips)
    stamp.write_text(size)


if __name__ == "__main__":
    main()

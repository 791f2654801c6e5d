"""The built-in recipe: two stages on generated, noisy clips of 16 x 16 pixels; a whole run takes about two seconds.

It has what a resume could forget: AdamW keeps two moments and a step count, drop path draws random numbers in every
forward pass, and the augmentation is the official one.
"""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from sfa_dist.chaos.workplace import CLIPS, EVAL_CLIPS, TINY, Sample, write_shards

CLASSES = 3
FRAMES, SIDE = 10, 16
RECIPE = """\
# Made by `sfa chaos`: its built-in recipe.
model: {{size: tiny, classes: {classes}, {dims}, drop_path: 0.2}}
data: {{train: ["{folder}/train/*.tar"], val: ["{folder}/val/*.tar"], stride: 1, resize: 20, workers: 0, decoder: pyav}}
batch: {{size: 8, micro: 2}}
optimizer: {{name: adamw, lr: 0.003}}
schedule: {{epochs: 4, warmup_epochs: 0.5}}
engine: {{precision: fp32}}
stage1: {{frames: 4}}
stage2: {{frames: 8, chunk_frames: 4}}
"""


def write_builtin(folder: Path) -> Path:
    """Writes the recipe and its clips; returns the recipe's path."""
    for split, clips, seed in (("train", CLIPS, 0), ("val", EVAL_CLIPS, 1)):
        write_shards(folder / split, noisy_samples(clips, seed))
    dims = ", ".join(
        f"{key}: {TINY[key]}" for key in ("width", "depth", "heads", "mlp", "patch", "image_size", "temporal_depth")
    )
    path = folder / "builtin.yaml"
    path.write_text(RECIPE.format(classes=CLASSES, dims=dims, folder=folder))
    return path


def noisy_samples(count: int, seed: int) -> list[Sample]:
    """Samples whose class is a level of grey, and whether it rises or falls."""
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        label = number % CLASSES
        levels = 60 + 60 * label + np.arange(FRAMES) * (4 if label % 2 else -4)
        noise = rng.normal(0, 20, (FRAMES, SIDE, SIDE, 3))
        frames = np.clip(levels[:, None, None, None] + noise, 0, 255).astype(np.uint8)
        members = {"mp4": _encode(frames), "json": b'{"label": %d}' % label, "cls": b"%d" % label}
        samples.append((f"clip{number:03d}", members))
    return samples


def _encode(frames: NDArray[np.uint8]) -> bytes:
    """An h264 mp4 of RGB frames (T, H, W, 3)."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "12", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()

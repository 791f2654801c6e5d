"""Small videos and shards for the tests of the data modules."""

from __future__ import annotations

import io
import json
from pathlib import Path

import av
import numpy as np
import torch
import webdataset as wds

from sfa_dist.data.batches.augment import SpatialViews
from sfa_dist.data.sampling.sample_plan import Ids, SamplePlan
from sfa_dist.recipe.blocks import Resize

SIZE = 32


def frame_level(number: int) -> int:
    """The grey level that says which frame it is; far enough apart to survive compression."""
    return 16 + 12 * number


def video_bytes(frames: int = 8, height: int = SIZE, width: int = SIZE, container: str = "mp4", gop: int = 4) -> bytes:
    """A video whose frame n is all grey at `frame_level(n)`, at 10 frames a second."""
    pixels = [np.full((height, width, 3), frame_level(n), np.uint8) for n in range(frames)]
    return encode(pixels, container, gop)


def encode(frames: list[np.ndarray], container: str = "mp4", gop: int = 4) -> bytes:
    """Encodes uint8 RGB frames; avi gets mpeg4, which has no pts, the others h264 with B-frames."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream("mpeg4" if container == "avi" else "libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.thread_count = gop, 1
        if container == "avi":
            stream.bit_rate = 2_000_000
        else:
            stream.codec_context.max_b_frames = 2
            stream.options = {"crf": "12", "preset": "ultrafast", "bf": "2"}
        for pixels in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode(None))
    return file.getvalue()


def audio_bytes() -> bytes:
    """An mp4 with sound only."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def write_shard(path: Path, samples: list[tuple[str, bytes, object]]) -> Path:
    """A shard of (key, video, label)."""
    with wds.TarWriter(str(path), encoder=False, mtime=0) as writer:
        for key, video, label in samples:
            facts = json.dumps({"label": label}).encode()
            writer.write({"__key__": key, "mp4": video, "json": facts, "cls": str(label).encode()})
    return path


def write_shards(folder: Path, sizes: list[int], frames: int = 8) -> list[Path]:
    """Shards of videos of `frames` + (number % 3) frames; labels 0, 1, 2, 0, ..."""
    videos = [video_bytes(frames + extra) for extra in range(3)]
    paths, number = [], 0
    for shard, size in enumerate(sizes):
        samples = [(f"clip{n:04d}", videos[n % 3], n % 3) for n in range(number, number + size)]
        paths.append(write_shard(folder / f"train-{shard:06d}.tar", samples))
        number += size
    return paths


def batch_ids(plan: SamplePlan, epoch: int, step: int) -> Ids:
    """Sample ids of a step's global batch: int64 (batch_size,), -1 beyond the end of the epoch."""
    return plan.ids_at(epoch, step * plan.batch_size + np.arange(plan.batch_size))


def eval_transform(
    clip: torch.Tensor, resize: int, crop: int, view: int = 0, views: int = 1, how: Resize = "official"
) -> torch.Tensor:
    """Spatial test view number `view` of `views` (1 or 3): uint8 (T, H, W, 3) -> uint8 (3, T, crop, crop)."""
    test = SpatialViews(resize, crop, how, views)
    return test.cut(test.shrink(clip), view).contiguous()

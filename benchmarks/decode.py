"""What decoding one training clip costs: our readers against ffmpeg itself, before and after `sfa pack --gop 12`.

    python benchmarks/decode.py
    python benchmarks/decode.py --video my.mp4 --frames 128 --stride 2

A clip is `--frames` frames, `--stride` apart, from a random start; each reader gets the same starts. Readers take turns
in each round, and the table has the median over the rounds of the processor time of one clip, in milliseconds and as a
share of what `ffmpeg -i FILE -f null -` takes to decode the whole file (a dash where there is no ffmpeg).
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import av
import numpy as np
import torch
from common import Cell, add_options, interleave, median_ratio, report, script, tree_clock

from sfa_dist.data.batches.augment import TrainView
from sfa_dist.data.packing.pack_settings import Encoding
from sfa_dist.data.packing.reencode import reencode
from sfa_dist.data.sampling.clip_sampling import frame_indices
from sfa_dist.data.video.decode import Decoder, choose_decoder
from sfa_dist.data.video.video import Shrink
from sfa_dist.errors import RecipeError
from sfa_dist.recipe.blocks import AugmentBlock

FFMPEG = "ffmpeg, whole file"


def make_video(seconds: int = 10, fps: int = 30, height: int = 256, width: int = 340, gop: int = 250) -> bytes:
    """A moving texture as H.264 at crf 23, with a key frame every `gop` frames."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((1, 3, 20, 30), dtype=np.float32))
    large = torch.nn.functional.interpolate(coarse, (2 * height, 2 * width), mode="bicubic").clamp(0, 1)[0]
    texture = (large * 255).byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.options = {"crf": "23", "preset": "medium"}
        for t in range(seconds * fps):
            top, left = (height // 2 + int(60 * np.sin(t / 9)), width // 2 + int(80 * np.cos(t / 13)))
            pixels = np.ascontiguousarray(texture[top : top + height, left : left + width])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode(None))
    return file.getvalue()


def usable_decoders() -> list[Decoder]:
    """PyAV, and torchcodec where it loads."""
    found = [choose_decoder("pyav")]
    try:
        found.append(choose_decoder("torchcodec"))
    except RecipeError as error:
        print(f"without torchcodec: {error}")
    return found


def readers(data: bytes, frames: int, stride: int) -> dict[str, Callable[[float], object]]:
    """By name: what reads one clip that starts at a share (0 to 1) of the video."""

    def clip(decoder: Decoder, share: float, shrink: Shrink | None = None) -> torch.Tensor:
        video = decoder.open(data)
        last = max(1, video.num_frames - (frames - 1) * stride)
        return video.frames_at(frame_indices(video.num_frames, frames, stride, int(share * last)), shrink)

    def augmented(decoder: Decoder, share: float) -> torch.Tensor:
        rng = np.random.Generator(np.random.Philox(1))
        view = TrainView(256, 224, AugmentBlock(), rng)
        return view.finish(clip(decoder, share, view.shrink))

    found: dict[str, Callable[[float], object]] = {}
    for decoder in usable_decoders():
        found[f"{decoder.name}, one clip"] = partial(clip, decoder)
        found[f"{decoder.name}, one clip, augmented"] = partial(augmented, decoder)
    return found


def ffmpeg(file: Path, _: float) -> None:
    """Decodes the whole file in one thread and throws it away."""
    subprocess.run(["ffmpeg", "-v", "error", "-threads", "1", "-i", str(file), "-f", "null", "-"], check=True)


def measure(videos: dict[str, bytes], frames: int, stride: int, rounds: int) -> list[list[Cell]]:
    """Rows: file, kilobytes, reader, milliseconds of processor time for one clip, share of ffmpeg's whole file."""
    starts = [0.5, *np.random.default_rng(0).random(rounds)]  # The first round loads libraries and is not counted.

    def turns(call: Callable[[float], object]) -> Callable[[], object]:
        own = iter(starts)
        return lambda: call(next(own))

    with tempfile.TemporaryDirectory() as folder:
        cases: dict[tuple[str, str], Callable[[], object]] = {}
        for number, (name, data) in enumerate(videos.items()):
            file = Path(folder) / f"{number}.mp4"
            file.write_bytes(data)
            if shutil.which("ffmpeg"):
                cases[name, FFMPEG] = turns(partial(ffmpeg, file))
            cases |= {(name, reader): turns(call) for reader, call in readers(data, frames, stride).items()}
        seconds = interleave(cases, rounds, clock=tree_clock)
    rows: list[list[Cell]] = []
    for (name, reader), own in sorted(seconds.items()):
        share = median_ratio(own, seconds[name, FFMPEG]) if (name, FFMPEG) in seconds else None
        rows.append([name, len(videos[name]) // 1000, reader, 1000 * median(own), share])
    return rows


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, help="default: 10 s of a moving texture, 340 x 256, 30 frames a second")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--stride", type=int, default=2)
    add_options(parser, rounds=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = arguments.video.read_bytes() if arguments.video else make_video()
    videos = {"as it is": source, "after --gop 12": reencode(source, Encoding(gop=12))}
    rows = measure(videos, arguments.frames, arguments.stride, arguments.rounds)
    title = f"one thread; {arguments.frames} frames, stride {arguments.stride}; medians of {arguments.rounds} rounds"
    report(arguments, title, ["file", "kB", "reader", "ms", "of ffmpeg's whole file"], rows)


if __name__ == "__main__":
    script(main)

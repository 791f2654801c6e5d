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
import json
import platform
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import av
import numpy as np
import torch

from sfa_dist.data.augment import train_transform
from sfa_dist.data.clip_sampling import frame_indices
from sfa_dist.data.decode import Decoder, choose_decoder
from sfa_dist.data.reencode import Encoding, reencode
from sfa_dist.errors import RecipeError
from sfa_dist.recipe_blocks import AugmentBlock


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

    def clip(decoder: Decoder, share: float) -> torch.Tensor:
        video = decoder.open(data)
        last = max(1, video.num_frames - (frames - 1) * stride)
        return video.frames_at(frame_indices(video.num_frames, frames, stride, int(share * last)))

    def augmented(decoder: Decoder, share: float) -> torch.Tensor:
        rng = np.random.Generator(np.random.Philox(1))
        return train_transform(clip(decoder, share), 256, 224, AugmentBlock(), rng)

    found: dict[str, Callable[[float], object]] = {}
    for decoder in usable_decoders():
        found[f"{decoder.name}, one clip"] = partial(clip, decoder)
        found[f"{decoder.name}, one clip, augmented"] = partial(augmented, decoder)
    return found


def ffmpeg_seconds(file: Path) -> float:
    """Processor seconds of ffmpeg on the whole file, one thread."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ["ffmpeg", "-v", "error", "-threads", "1", "-i", str(file), "-f", "null", "-"]
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(videos: dict[str, bytes], frames: int, stride: int, rounds: int) -> list[dict[str, object]]:
    """Rows: file, reader, kilobytes, milliseconds of processor time for one clip, share of ffmpeg's whole file."""
    starts = np.random.default_rng(0).random(rounds)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{number}.mp4" for number, name in enumerate(videos)}
        for name, file in files.items():
            file.write_bytes(videos[name])
        work: dict[tuple[str, str], Callable[[float], object]] = {
            (name, reader): call
            for name, data in videos.items()
            for reader, call in readers(data, frames, stride).items()
        }
        for call in work.values():
            call(0.5)  # The first call loads libraries.
        taken: dict[tuple[str, str], list[float]] = {}
        for start in starts:
            for name, file in files.items():
                if shutil.which("ffmpeg"):
                    taken.setdefault((name, "ffmpeg, whole file"), []).append(ffmpeg_seconds(file))
            for key, call in work.items():
                began = time.process_time()
                call(start)
                taken.setdefault(key, []).append(time.process_time() - began)
    rows: list[dict[str, object]] = []
    for (name, reader), seconds in sorted(taken.items()):
        reference = taken.get((name, "ffmpeg, whole file"))
        share = round(median(seconds) / median(reference), 2) if reference else None
        size = len(videos[name]) // 1000
        rows.append(
            {"file": name, "reader": reader, "kB": size, "ms": round(1000 * median(seconds), 1), "share": share}
        )
    return rows


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, help="default: 10 s of a moving texture, 340 x 256, 30 frames a second")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--stride", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = arguments.video.read_bytes() if arguments.video else make_video()
    videos = {"as it is": source, "after --gop 12": reencode(source, Encoding(gop=12))}
    rows = measure(videos, arguments.frames, arguments.stride, arguments.rounds)
    if arguments.json:
        print(json.dumps({"machine": machine(), "frames": arguments.frames, "stride": arguments.stride, "rows": rows}))
        return
    print(f"{machine()}; {arguments.frames} frames, stride {arguments.stride}; medians of {arguments.rounds} rounds\n")
    print("| file | kB | reader | ms | of ffmpeg's whole file |\n|---|---|---|---|---|")
    for row in rows:
        share = "-" if row["share"] is None else f"{row['share']:.2f}"
        print(f"| {row['file']} | {row['kB']} | {row['reader']} | {row['ms']} | {share} |")


def machine() -> str:
    """What this runs on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor()}, one thread"


if __name__ == "__main__":
    main()

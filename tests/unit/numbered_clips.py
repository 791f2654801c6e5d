"""Videos whose frames hold their own number, by the ffmpeg command, and the numbers that a player shows of a file.

Containers x codecs x orders of frames x trims: each as somebody's camera, encoder or editor writes it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

HEIGHT, WIDTH = 48, 64
_ROWS, _COLUMNS = 2, 4  # blocks, each a bit of the number
FRAMES, RATE = 60, 25
FFMPEG = shutil.which("ffmpeg")


def picture(number: int) -> npt.NDArray[np.uint8]:
    """uint8 (HEIGHT, WIDTH, 3): a black or white block for each bit of the number."""
    bits = np.array([number >> bit & 1 for bit in range(_ROWS * _COLUMNS)]).reshape(_ROWS, _COLUMNS)
    blocks = np.where(bits, 235, 16).astype(np.uint8)
    return np.kron(blocks, np.ones((HEIGHT // _ROWS, WIDTH // _COLUMNS), np.uint8))[..., None].repeat(3, axis=2)


def number_of(frame: npt.ArrayLike) -> int:
    """Which number a picture holds; (H, W, 3) of any levels."""
    inner = np.asarray(frame, dtype=np.float32).reshape(_ROWS, HEIGHT // _ROWS, _COLUMNS, WIDTH // _COLUMNS, 3)
    means = inner[:, 6:-6, :, 4:-4].mean(axis=(1, 3, 4)).ravel()
    return sum(int(mean > 128) << bit for bit, mean in enumerate(means))


def ffmpeg(*arguments: str | Path, raw: bytes | None = None) -> bytes:
    """What the command gives."""
    assert FFMPEG is not None
    command = [FFMPEG, "-hide_banner", "-loglevel", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, input=raw, capture_output=True, check=True).stdout


def shown(path: Path) -> list[int]:
    """The numbers of the frames that a player shows, one after another."""
    raw = ffmpeg("-i", path, "-map", "0:v:0", "-vsync", "0", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return [number_of(frame) for frame in np.frombuffer(raw, np.uint8).reshape(-1, HEIGHT, WIDTH, 3)]


def write(path: Path, *options: str, frames: Sequence[int] = range(FRAMES), rate: float = RATE) -> Path:
    """Encodes the pictures of these numbers with options of the command."""
    raw = b"".join(picture(number).tobytes() for number in frames)
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", str(rate), "-i", "-")
    ffmpeg(*source, *options, path, raw=raw)
    return path


def _x264(*options: str) -> tuple[str, ...]:
    return ("-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p", "-g", "12", "-threads", "1", *options)


_QUIET = "log-level=none:pools=none:frame-threads=1"
_X265 = f"keyint=12:bframes=3:b-adapt=0:{_QUIET}"
H265 = ("-c:v", "libx265", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-x265-params", _X265)
H264 = _x264("-bf", "2")
OPEN = _x264("-bf", "3", "-x264-params", "open-gop=1:b-adapt=0")
PYRAMID = _x264("-bf", "8", "-b-pyramid", "normal", "-x264-params", "b-adapt=0")
MPEG4 = ("-c:v", "mpeg4", "-q:v", "3", "-g", "12")
MPEG2 = ("-c:v", "mpeg2video", "-q:v", "3", "-g", "12", "-bf", "2")
VPX = ("-deadline", "good", "-cpu-used", "8", "-lag-in-frames", "16", "-auto-alt-ref", "1", "-g", "24", "-b:v", "300k")

# What an encoder writes: a file name, which says the container, and the options.
ENCODED: dict[str, tuple[str, ...]] = {
    "h264.mp4": H264,
    "h264.mkv": H264,
    "h264.mov": H264,
    "h264.avi": H264,
    "open.mkv": OPEN,
    "pyramid.mp4": PYRAMID,
    "interlaced.mp4": (*H264, "-flags", "+ildct+ilme"),
    "refresh.mp4": _x264("-bf", "0", "-x264-params", "intra-refresh=1"),
    "fragments.mp4": (*H264, "-movflags", "frag_keyframe+empty_moov"),
    "no_edit_list.mp4": (*H264, "-use_editlist", "0"),
    "negative_offsets.mp4": (*H264, "-movflags", "negative_cts_offsets"),
    "later.mkv": (*H264, "-output_ts_offset", "3.7"),
    "hevc.mp4": (*H265, "-tag:v", "hvc1"),
    "hevc.mkv": H265,
    "mpeg4.avi": MPEG4,
    "mpeg4_b.avi": (*MPEG4, "-bf", "2"),
    "mpeg4_b.mkv": (*MPEG4, "-bf", "2"),
    "packed.avi": ("-c:v", "libxvid", "-bf", "2", "-q:v", "3", "-g", "12"),
    "mpeg2.mkv": MPEG2,
    "vp9.webm": ("-c:v", "libvpx-vp9", *VPX),
    "vp8.webm": ("-c:v", "libvpx", *VPX),
    "av1.webm": ("-c:v", "libaom-av1", "-cpu-used", "8", "-lag-in-frames", "16", "-g", "24", "-pix_fmt", "yuv420p"),
    "mjpeg.avi": ("-c:v", "mjpeg", "-q:v", "3"),
}
# What is cut from one of these without encoding: its file name, and from where in seconds.
TRIMMED: dict[str, tuple[str, float]] = {
    "h264_trimmed.mp4": ("h264.mkv", 0.7),
    "h264_trimmed.avi": ("h264.avi", 0.7),
    "open_trimmed.mkv": ("open.mkv", 0.6),
    "open_trimmed.mov": ("open.mkv", 0.7),
    "hevc_trimmed.mkv": ("hevc.mkv", 0.7),
    "hevc_trimmed.mp4": ("hevc.mkv", 0.7),
    "mpeg2_trimmed.mkv": ("mpeg2.mkv", 0.7),
    "mpeg2_trimmed.mp4": ("mpeg2.mkv", 0.6),
    "mpeg4_trimmed.mkv": ("mpeg4_b.mkv", 0.7),
    "mpeg4_trimmed.avi": ("mpeg4_b.avi", 0.7),
    "vp9_trimmed.webm": ("vp9.webm", 0.7),
}


def make(name: str, folder: Path) -> Path:
    """A file of the tables in `folder`, or of the odd ones; made once."""
    path = folder / name
    if path.exists():
        return path
    if name in ENCODED:
        return write(path, *ENCODED[name])
    if name in TRIMMED:
        source, start = TRIMMED[name]
        ffmpeg("-ss", str(start), "-i", make(source, folder), "-c", "copy", path)
        return path
    ODD[name](folder, path)
    return path


def _without_start(folder: Path, path: Path) -> None:
    ffmpeg("-i", make("h264.mkv", folder), "-c", "copy", "-bsf:v", "noise=drop='lt(n,3)'", path)


def _times_of_decoding(folder: Path, path: Path) -> None:
    """As copied from an AVI: the times rise as the frames are decoded."""
    ffmpeg("-i", make("h264.mkv", folder), "-c", "copy", "-bsf:v", "setts=pts='N*40/1000/TB':dts='N*40/1000/TB'", path)


def _joined(folder: Path, path: Path) -> None:
    parts = [make("hevc_trimmed.mp4", folder), make("hevc.mp4", folder)]
    (folder / "parts.txt").write_text("".join(f"file {part}\n" for part in parts))
    ffmpeg("-f", "concat", "-safe", "0", "-i", folder / "parts.txt", "-c", "copy", path)


def _variable(folder: Path, path: Path) -> None:
    del folder
    times = ("-vf", "setpts='N+mod(N\\,7)*0.13+gt(N\\,20)*9'/25/TB", "-vsync", "vfr", "-enc_time_base", "1/1000")
    write(path, *times, *H264)


def _undecodable_start(source: str, *options: str) -> Callable[[Path, Path], object]:
    """A trim whose first B-frames lack what they need, in a container that gives them times behind the key frame's."""
    return lambda folder, path: ffmpeg("-ss", "0.7", "-i", make(source, folder), "-c", "copy", *options, path)


ODD: dict[str, Callable[[Path, Path], object]] = {
    "mpeg2_no_edit_list.mp4": _undecodable_start("mpeg2.mkv", "-use_editlist", "0"),
    "mpeg4_fragments.mp4": _undecodable_start("mpeg4_b.mkv", "-movflags", "frag_keyframe+empty_moov"),
    "single.mp4": lambda folder, path: write(path, *H264, frames=[7]),
    "single.avi": lambda folder, path: write(path, *MPEG4, "-bf", "2", frames=[7]),
    "without_start.mkv": _without_start,
    "times_of_decoding.mkv": _times_of_decoding,
    "joined.mkv": _joined,
    "variable.mp4": _variable,
}
NAMES = (*ENCODED, *TRIMMED, *ODD)

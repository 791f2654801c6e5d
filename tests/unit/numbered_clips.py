"""Videos whose frames hold their own number, by the ffmpeg command, and the numbers that a player shows of a file.

Containers x codecs x orders of frames x trims: each as somebody's camera, encoder or editor writes it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
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

"""Turned and mirrored videos: what each reader gives is what `ffmpeg` shows."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from sfa_dist.data.packing.pack_settings import Encoding
from sfa_dist.data.packing.reencode import encode_frames, reencode
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.data.video.decode import choose_decoder
from sfa_dist.data.video.decode_pyav import PyAVVideo
from sfa_dist.data.video.frame_source import open_source
from sfa_dist.data.video.orientation import UPRIGHT, orientation_of
from sfa_dist.recipe.blocks import LimitsBlock

HEIGHT, WIDTH, FRAMES = 96, 128, 3
ONE, LAST = 1 << 16, 1 << 30
MATRICES = {
    "mirrored": (-ONE, 0, 0, 0, ONE, 0, WIDTH * ONE, 0, LAST),
    "upside down": (ONE, 0, 0, 0, -ONE, 0, 0, HEIGHT * ONE, LAST),
    "transposed": (0, ONE, 0, ONE, 0, 0, 0, 0, LAST),
    "transposed over the other diagonal": (0, -ONE, 0, -ONE, 0, 0, HEIGHT * ONE, WIDTH * ONE, LAST),
    "90": (0, ONE, 0, -ONE, 0, 0, HEIGHT * ONE, 0, LAST),
    "180": (-ONE, 0, 0, 0, -ONE, 0, WIDTH * ONE, HEIGHT * ONE, LAST),
    "270": (0, -ONE, 0, ONE, 0, 0, 0, WIDTH * ONE, LAST),
}
SAME = {
    "identity": (ONE, 0, 0, 0, ONE, 0, 0, 0, LAST),
    "shifted": (ONE, 0, 0, 0, ONE, 0, 40 * ONE, -7 * ONE, LAST),
    "scaled": (2 * ONE, 0, 0, 0, ONE, 0, 0, 0, LAST),
    "nothing": (0,) * 9,
    "less than half a degree": (ONE, 300, 0, -300, ONE, 0, 0, 0, LAST),
}
ASKEW = {
    "45": (46341, 46341, 0, -46341, 46341, 0, 0, 0, LAST),
    "2": (65496, 2287, 0, -2287, 65496, 0, 0, 0, LAST),
    "sheared": (ONE, ONE // 3, 0, 0, ONE, 0, 0, 0, LAST),
}
DECODERS = ("torchcodec", "pyav")
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg command")


def ffmpeg(*arguments: str | Path) -> bytes:
    return subprocess.run(["ffmpeg", "-v", "error", "-y", *arguments], check=True, capture_output=True).stdout


@pytest.fixture(scope="module")
def plain() -> bytes:
    return four_corners()


def four_corners(frames: int = FRAMES) -> bytes:
    """Four corners of four colours: each of the eight orientations looks different."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[:48, :64], picture[:48, 64:], picture[48:, :64] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for _ in range(frames):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(stream.encode(None))
    return file.getvalue()


def with_matrix(data: bytes, track: tuple[int, ...] | None = None, movie: tuple[int, ...] | None = None) -> bytes:
    """The mp4 with other matrices in its track's and in its movie's header (version 0 boxes)."""
    for name, offset, matrix in ((b"tkhd", 44, track), (b"mvhd", 40, movie)):
        if matrix is not None:
            at = data.find(name) + offset
            data = data[:at] + struct.pack(">9i", *matrix) + data[at + 36 :]
    return data


def remuxed(data: bytes, container: str) -> bytes:
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format=container) as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                out.mux(packet)
    return file.getvalue()


def shown(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The first frame as ffmpeg shows it, uint8 (height, width, 3)."""
    raw = ffmpeg("-i", path, "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(raw, np.uint8).reshape(*size, 3)


def corners(picture: np.ndarray) -> list[int]:
    """Red, green, blue or black (0 to 3), from the top left on."""
    height, width = picture.shape[:2]
    places = [(row, column) for row in (height // 4, 3 * height // 4) for column in (width // 4, 3 * width // 4)]
    return [int(np.argmax([*picture[place], 100])) for place in places]


def check(data: bytes, folder: Path, suffix: str) -> list[int]:
    """Every reader against ffmpeg; what it shows."""
    path = folder / f"clip{suffix}"
    path.write_bytes(data)
    video = PyAVVideo(data, LimitsBlock())
    expected = shown(path, (video.height, video.width))
    for name in DECODERS:
        video = choose_decoder(name).open(data)
        frame = video.frames_at([0, video.num_frames - 1])[1].numpy()
        assert frame.shape == (video.height, video.width, 3) == expected.shape
        assert corners(frame) == corners(expected)
    with open_source(str(path), "stored", LimitsBlock()) as source:
        assert corners(next(source.frames)) == corners(expected)
    packed = choose_decoder("pyav").open(reencode(data, Encoding(short_side=48)))
    assert corners(packed.frames_at([0])[0].numpy()) == corners(expected)
    assert (packed.height, packed.width) == tuple(side // 2 for side in expected.shape[:2])
    return corners(expected)


@needs_ffmpeg
@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("matrix", MATRICES.values(), ids=list(MATRICES))
def test_a_matrix_in_the_header(matrix, container, plain, tmp_path):
    data = with_matrix(plain, track=matrix)
    seen = check(data if container == "mp4" else remuxed(data, container), tmp_path, "." + container[:3])
    assert seen != corners(PyAVVideo(plain, LimitsBlock()).frames_at([0])[0].numpy())


@needs_ffmpeg
@pytest.mark.parametrize(
    ("track", "movie"), [(None, "mirrored"), ("mirrored", "90"), ("90", "mirrored"), ("upside down", "transposed")]
)
def test_the_movies_matrix_comes_on_top_of_the_tracks(track, movie, plain, tmp_path):
    check(with_matrix(plain, track and MATRICES[track], MATRICES[movie]), tmp_path, ".mp4")


def console_line(turn: str, data: bytes, folder: Path) -> bytes:
    """The video with an orientation in the stream itself, at its key frames."""
    (folder / "plain.mp4").write_bytes(data)
    bits = f"h264_metadata=display_orientation=insert:{turn}"
    ffmpeg("-i", folder / "plain.mp4", "-c", "copy", "-bsf:v", bits, folder / "own.mkv")
    return (folder / "own.mkv").read_bytes()


@needs_ffmpeg
@pytest.mark.parametrize("turn", ["rotate=90", "flip=horizontal", "rotate=90:flip=vertical"])
def test_a_stream_that_tells_its_own_orientation(turn, tmp_path):
    check(console_line(turn, four_corners(1), tmp_path), tmp_path, ".mkv")


@needs_ffmpeg
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("turn", ["rotate=90", "flip=horizontal"])
def test_an_orientation_of_the_first_frame_alone_is_refused(name, turn, plain, tmp_path):
    video = choose_decoder(name).open(console_line(turn, plain, tmp_path))
    with pytest.raises(BadSample, match="the orientation of the picture changes inside the video"):
        video.frames_at([1, 2])


@needs_ffmpeg
@pytest.mark.parametrize("matrix", SAME.values(), ids=list(SAME))
def test_matrices_that_change_nothing(matrix, plain, tmp_path):
    assert orientation_of(matrix) == UPRIGHT
    if any(matrix):
        check(with_matrix(plain, track=matrix), tmp_path, ".mp4")


@pytest.mark.parametrize("matrix", ASKEW.values(), ids=list(ASKEW))
@pytest.mark.parametrize("name", DECODERS)
def test_other_angles_are_refused_by_name(name, matrix, plain):
    data = with_matrix(plain, track=matrix)
    with pytest.raises(BadSample, match=r"turns the picture by \d+ degrees, which is not a multiple of 90"):
        choose_decoder(name).open(data).frames_at([0])


@pytest.mark.parametrize("tag", range(1, 9))
def test_pictures_of_a_folder_are_turned_by_their_exif(tag, tmp_path):
    """The eight values of EXIF's Orientation: in one frame of a folder as in the picture that PIL shows."""
    rows, columns = np.mgrid[:24, :48]
    picture = Image.fromarray((rows * 6 + columns * 2).astype(np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = tag
    picture.save(tmp_path / "1.jpg", exif=exif, quality=95)
    video = PyAVVideo(encode_frames(tmp_path, 1, 1, 10.0, Encoding()), LimitsBlock())
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "1.jpg"))).astype(int)
    assert (video.height, video.width) == expected.shape[:2] == ((24, 48) if tag < 5 else (48, 24))
    assert np.abs(video.frames_at([0])[0].numpy() - expected).mean() < 4
    for name in DECODERS:  # The picture itself as a clip of one frame.
        own = choose_decoder(name).open((tmp_path / "1.jpg").read_bytes()).frames_at([0])[0].numpy()
        assert np.abs(own - expected).mean() < 4

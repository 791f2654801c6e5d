"""What the console says of the loader's share, and that the advice fits what the stage does."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import pytest

from sfa_dist.data.video.clip_encoding import ClipEncoding, encoding_of_bytes
from sfa_dist.recipe.schema import Stage1, Stage2, StageBlock
from sfa_dist.training.loader_share import loader_line

PLAIN = {
    **{"frames": 8, "model": {"size": "tiny", "classes": 5, "image_size": 16}, "optimizer": {"lr": 0.1}},
    **{"schedule": {"epochs": 1}},
}


def stage1(workers: int = 2, **data: Any) -> StageBlock:
    return Stage1.model_validate({**PLAIN, "data": {"train": ["a.tar"], "workers": workers, **data}})


def stage2(workers: int = 2, **keys: Any) -> StageBlock:
    return Stage2.model_validate({**PLAIN, "data": {"train": ["a.tar"], "workers": workers}, **keys})


def test_little_waiting_is_not_worth_a_line() -> None:
    assert loader_line(0.0, stage1(), cores=8) is None
    assert loader_line(0.05, stage1(), cores=8) is None
    assert loader_line(0.051, stage1(), cores=8) is not None


def test_idle_cores_come_first() -> None:
    assert loader_line(0.234, stage1(), cores=8) == (
        "loader: 23% of the step is waiting for clips; raise data.workers (now 2; a rank has 8 cores here), "
        "or re-encode the clips (sfa pack --gop 12 --short-side 256)"
    )


@pytest.mark.parametrize(
    ("stage", "said", "unsaid"),
    [
        (stage1(8), ["sfa pack --gop 12 --short-side 256", "more than 8 cores"], ["raise data.workers", "cache"]),
        (stage1(8, resize=320), ["--short-side 320"], []),
        (stage1(8, train=["s3://b/a.tar"]), ["data.remote.cache_dir"], ["raise data.workers"]),
        (stage1(8, train=["s3://b/a.tar"], remote={"cache_dir": "/tmp/x"}), ["sfa pack"], ["remote.cache_dir"]),
        (stage2(), ["raise data.workers", "stage2.cache)"], ["sfa pack"]),
        (stage2(8), ["stage2.cache)", "sfa pack"], ["raise data.workers"]),
        (stage2(8, adapter={"placement": "tokens"}), ["sfa pack", "more than 8 cores"], ["stage2.cache"]),
        (stage2(8, cache={"views": 2}), ["waiting for features", "stage2.cache.dir"], ["sfa pack", "clips"]),
        (stage2(8, cache={"views": 2, "live_fraction": 0.5}), ["waiting for clips", "sfa pack"], ["cache"]),
    ],
)
def test_advice_fits_the_stage(stage: StageBlock, said: list[str], unsaid: list[str]) -> None:
    line = loader_line(0.5, stage, cores=8)
    assert line is not None
    assert all(words in line for words in said), line
    assert not any(words in line for words in unsaid), line


@pytest.mark.parametrize(
    ("workers", "cores", "clips", "more_cores", "line"),
    [
        (0, 1, ClipEncoding(1, 256), False, None),  # One core, each frame a key frame: nothing helps.
        (0, 1, ClipEncoding(12, 200), False, None),
        (8, 8, ClipEncoding(1, 256), False, None),
        (0, 1, ClipEncoding(1, 256), True, "give each rank more than 1 core (cpus"),
        (0, 1, ClipEncoding(250, 256), False, "re-encode"),
        (0, 1, ClipEncoding(1, 1080), False, "re-encode"),
        (0, 2, ClipEncoding(1, 256), False, "raise data.workers"),
    ],
)
def test_advice_that_cannot_help_is_not_given(
    workers: int, cores: int, clips: ClipEncoding, more_cores: bool, line: str | None
) -> None:
    told = loader_line(0.5, stage1(workers), cores, clips, more_cores)
    assert told is None if line is None else line in (told or "")
    assert "re-encode" in (told or "") or line != "re-encode"


@pytest.mark.parametrize(
    ("codec", "options", "gop"),
    [("mpeg4", {"g": "12"}, 12), ("mpeg4", {"g": "1"}, 1), ("mjpeg", {}, 1), ("mpeg4", {"g": "300"}, 30)],
)
def test_how_a_clip_is_encoded_is_read_from_its_packets(codec: str, options: dict[str, str], gop: int) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        stream = out.add_stream(codec, rate=10, options=options)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for _ in range(30):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), "rgb24")))
        out.mux(stream.encode())
    assert encoding_of_bytes(buffer.getvalue()) == (gop, 48)
    for damaged in (b"", b"nothing", buffer.getvalue()[:300]):
        assert encoding_of_bytes(damaged) is None

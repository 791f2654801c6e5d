"""`sfa predict` on the weights of real runs: the test's own scores, and timelines equal to windows run alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import ONE_THREAD, ROOT, train
from data_samples import audio_bytes, eval_transform
from odd_samples import blocks, encode_as
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_runs import CLASSES, RECIPE, VAL_CLIPS, make_workplace, sets

from sfa_dist.data.sampling.clip_sampling import frame_indices
from sfa_dist.data.shards.reader import read_clip_bytes
from sfa_dist.data.shards.shard_index import load_index
from sfa_dist.data.video.decode import choose_decoder
from sfa_dist.inference.finished_stage import finished_of_run
from sfa_dist.inference.predictor import Model
from sfa_dist.recipe.schema import load_recipe
from sfa_dist.tools.cli import main

NAMES = ["open a door", "close a door", "knock"]
# The timeline's chunks are not the clip's, so matrix products add up in another order: fp32, logits of about 1.
TOLERANCE = {"rtol": 0.0, "atol": 2e-5}


def named(folder: Path) -> None:
    """Class names into the manifests, as `sfa pack` writes them."""
    for split in ("train", "val"):
        (folder / split / "manifest.json").write_text(json.dumps({"classes": NAMES}))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, `done`; videos: each validation clip, `long.mp4` of 90 frames, and a file of sound."""
    place = make_workplace(tmp_path_factory.mktemp("predict"), RECIPE.replace("stride: 1", "stride: 2"))
    named(place)
    finished = train(place, "--recipe", "t.yaml", "--run-dir", "done")
    assert finished.code == 0, finished.err
    index = load_index(sorted((place / "val").glob("*.tar")))
    for sample in range(len(index)):
        (place / f"clip{sample}.mp4").write_bytes(read_clip_bytes(index, sample))
    long = [np.roll(blocks(number // 9, 24, 32), number, axis=1) for number in range(90)]
    (place / "long.mp4").write_bytes(encode_as("libx264", frames=long))
    (place / "sound.mp4").write_bytes(audio_bytes())
    return place


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def predict(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """(exit code, JSON lines, stderr)."""
    code = main(["predict", *arguments, "--json"])
    said = capsys.readouterr()
    return code, [json.loads(line) for line in said.out.splitlines()], said.err


def test_the_scores_of_the_test(here, capsys):
    """Each clip by itself: as many are right as the stage `test` counted, and names and scores go with the labels."""
    clips = [f"clip{number}.mp4" for number in range(VAL_CLIPS)]
    code, lines, _ = predict(capsys, *clips, "--run", "done")
    assert code == 0
    assert [line["file"] for line in lines] == clips
    index = load_index(sorted((here / "val").glob("*.tar")))
    right = sum(line["top5"][0]["label"] == label for line, label in zip(lines, index.label.tolist(), strict=True))
    assert right / VAL_CLIPS == pytest.approx(json.loads((here / "done" / "result.json").read_text())["acc1"])
    for line in lines:
        assert [entry["name"] for entry in line["top5"]] == [NAMES[entry["label"]] for entry in line["top5"]]
        scores = [entry["score"] for entry in line["top5"]]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1.0, abs=1e-5)
        assert len(scores) == CLASSES


def test_weights_by_their_files(here, capsys):
    """The same as by the run, for both stages."""
    stage1, stage2 = (str(here / "done" / name / "weights.safetensors") for name in ("stage1", "stage2"))
    _, [by_run], _ = predict(capsys, "clip0.mp4", "--run", "done")
    files = ["--recipe", "t.yaml", "--weights"]
    _, [by_files], _ = predict(capsys, "clip0.mp4", *files, stage2, "--trunk-weights", stage1)
    assert by_files == by_run
    code, [first], _ = predict(capsys, "clip0.mp4", *files, stage1, "--top", "2")
    assert code == 0
    assert len(first["top5"]) == 2


def test_files_that_do_not_decode_are_told_and_the_others_predicted(here, capsys):
    code, lines, err = predict(capsys, "clip0.mp4", "sound.mp4", "clip1.mp4", "--run", "done")
    assert code == 65
    assert [line["file"] for line in lines if "top5" in line] == ["clip0.mp4", "clip1.mp4"]
    assert lines[1].keys() == {"file", "error"}
    assert "no video stream" in lines[1]["error"]
    assert "error: sound.mp4: " in err
    assert len(err.splitlines()) == 1


def test_broken_weights_are_told(here, capsys, tmp_path):
    with safe_open(here / "done" / "stage1" / "weights.safetensors", framework="pt") as file:
        state = {name: file.get_tensor(name) * 1e30 for name in file.keys()}  # noqa: SIM118 -- no dictionary
        save_file(state, tmp_path / "huge.safetensors", file.metadata())
    own = ("--recipe", "t.yaml", "--weights", str(tmp_path / "huge.safetensors"))
    for timeline in ((), ("--timeline", "--out", str(tmp_path))):
        code, lines, err = predict(capsys, "clip0.mp4", *own, *timeline)
        assert code == 70
        assert not [line for line in lines if "top5" in line]
        assert "huge.safetensors: the model's scores are not finite" in err


STAGE2 = "done/stage2/weights.safetensors"
USAGE = {
    "no such file": ["nope.mp4", "--run", "done"],
    "val is a folder: name the videos in it, val/*.mp4": ["val", "--run", "done"],
    "it has no recipe.yaml": ["clip0.mp4", "--run", "val"],
    "needs --run": ["clip0.mp4"],
    "either --run, or": ["clip0.mp4", "--run", "done", "--weights", STAGE2],
    "holds no trunk": ["clip0.mp4", "--recipe", "t.yaml", "--weights", STAGE2],
    "has no classes of videos": [*("clip0.mp4", "--recipe", "t.yaml"), "--weights", "done/image/weights.safetensors"],
    "only --timeline takes it": ["-", "--run", "done"],
    "cannot be read, only rtsp": ["gopher://x/y", "--run", "done", "--timeline"],
    "--hop is a number": ["clip0.mp4", "--run", "done", "--hop", "1"],
    "is a file: give a folder": ["clip0.mp4", "--run", "done", "--timeline", "--out", "clip0.mp4"],
    "would write the same files": ["clip0.mp4", "./clip0.mp4", "--run", "done", "--timeline"],
    "--top must be": ["clip0.mp4", "--run", "done", "--top", "0"],
}


@pytest.mark.parametrize("text", USAGE)
def test_wrong_command_lines(here, capsys, text):
    code, lines, err = predict(capsys, *USAGE[text])
    assert (code, [line["exit_code"] for line in lines]) == (64, [64])
    assert text in err
    assert len(err.splitlines()) == 1


def test_what_is_not_there_or_does_not_fit(here, capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes((here / "done" / "recipe.yaml").read_bytes())
    code, _, err = predict(capsys, "clip0.mp4", "--run", str(tmp_path))
    assert (code, "train it to the end first" in err) == (74, True)
    files = ["--recipe", "t.yaml", "--weights", STAGE2, "--trunk-weights"]
    code, _, err = predict(capsys, "clip0.mp4", *files, "x")
    assert (code, "no weights file x" in err) == (74, True)
    code, _, err = predict(capsys, "clip0.mp4", "--run", "done", *sets("stage2.model.classes=4"))
    assert (code, len(err.splitlines())) == (78, 1), err


# ------------------------------------------------------------------------------------------------------- timelines


def model_of(run: Path, stage: str = "stage2", overrides: Sequence[str] = ()) -> Model:
    """A run's stage, as the command loads it."""
    recipe = load_recipe(run / "recipe.yaml", overrides, {}).recipe
    return Model(recipe, finished_of_run(recipe, run, stage), torch.device("cpu"))


def alone(place: Path, run: str, starts: list[int], **overrides: Any) -> torch.Tensor:
    """Logits of the windows at these frames of long.mp4, each cut and run by itself, (windows, classes)."""
    model = model_of(place / run, overrides=[f"{key}={value}" for key, value in overrides.items()])
    stage = model.stage
    video = choose_decoder("pyav", stage.data.limits, stage.data.fps).open((place / "long.mp4").read_bytes())
    found = []
    for start in starts:
        numbers = frame_indices(video.num_frames, stage.frames, stage.data.stride, start)
        clip = eval_transform(video.frames_at(numbers), stage.data.resize, stage.model.image_size)
        found.append(model.logits(clip.unsqueeze(0))[0])
    return torch.stack(found)


@pytest.mark.parametrize(
    ("hop", "frames", "overrides"),
    [
        ("0.4", 4, {}),
        ("0.8", 8, {}),
        ("0.1", 1, {}),
        ("1.2", 4, {"stage2.chunk_frames": 2, "stage2.data.fps": 4.0}),
        ("0.4", 4, {"stage2.data.fps": "stored"}),
    ],
)
def test_a_timeline_is_its_windows_run_alone(here, capsys, tmp_path, hop, frames, overrides):
    options = sets(*(f"{key}={value}" for key, value in overrides.items()))
    arguments = ["long.mp4", "--run", "done", "--timeline", "--hop", hop, "--out", str(tmp_path), *options]
    code, lines, err = predict(capsys, *arguments)
    assert code == 0
    assert "windows of 8 frames" in err
    written = json.loads((tmp_path / "long.timeline.json").read_text())
    assert written["windows"] == lines
    assert (written["hop_frames"], written["window_frames"]) == (frames, 8)
    assert (tmp_path / "long.timeline.png").read_bytes().startswith(b"\x89PNG")
    fps = written["fps"]
    starts = [round(line["start"] * fps) for line in lines]
    length = 36 if overrides.get("stage2.data.fps") == 4.0 else 90
    assert starts == list(range(0, length - 15 + 1, frames))
    probabilities = alone(here, "done", starts, **overrides).softmax(dim=1)
    for line, expected in zip(lines, probabilities, strict=True):
        got = torch.empty(CLASSES)
        for entry in line["top5"]:
            got[entry["label"]] = entry["score"]
        torch.testing.assert_close(got, expected, **TOLERANCE)
        assert line["end"] - line["start"] == pytest.approx(15 / fps)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_steps_and_windows_are_the_clips_function(place, stage):
    """The two halves of a model, put together, against the whole: for the end-to-end stage too."""
    model = model_of(place / "done", stage)
    side, frames = model.stage.model.image_size, model.stage.frames
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (2, 3, frames, side, side), dtype=torch.uint8, generator=generator)
    tubelets = model.trunk.trunk.cut_tubelets(clips)
    whole = model.windows(model.steps(tubelets).unflatten(0, (2, -1)))
    torch.testing.assert_close(whole, model.logits(clips), **TOLERANCE)
    by_one = torch.cat([model.steps(tubelet.unsqueeze(0)) for tubelet in tubelets]).unflatten(0, (2, -1))
    torch.testing.assert_close(model.windows(by_one), whole, **TOLERANCE)


def test_a_timeline_of_a_short_video_and_of_none(here, capsys, tmp_path):
    code, lines, err = predict(
        *(capsys, "clip0.mp4", "sound.mp4", "--run", "done", "--timeline", "--out", str(tmp_path), "--top", "1")
    )
    assert code == 65
    assert [len(line["top5"]) for line in lines if "top5" in line] == [1]
    assert lines[-1]["file"] == "sound.mp4"
    assert "error: sound.mp4: " in err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clip0.timeline.json", "clip0.timeline.png"]


def test_damage_ends_a_timeline_and_keeps_what_came_before(here, capsys, tmp_path):
    whole = (here / "long.mp4").read_bytes()
    kept = whole.index(b"mdat") + (len(whole) - whole.index(b"mdat")) * 2 // 3
    (tmp_path / "cut.mp4").write_bytes(whole[:kept] + bytes(len(whole) - kept))
    arguments = ["--run", "done", "--timeline", "--hop", "0.4", "--out", str(tmp_path)]
    code, lines, err = predict(capsys, str(tmp_path / "cut.mp4"), *arguments)
    assert code == 65
    assert "cannot be decoded" in lines[-1]["error"]
    assert "error: " in err
    _, undamaged, _ = predict(capsys, "long.mp4", *arguments)
    assert 3 < len(lines[:-1]) < len(undamaged)
    assert json.loads((tmp_path / "cut.timeline.json").read_text())["windows"] == lines[:-1]
    assert [line["start"] for line in lines[:-1]] == [line["start"] for line in undamaged[: len(lines) - 1]]
    assert (tmp_path / "cut.timeline.png").is_file()


def test_a_reader_that_leaves_ends_it_quietly(place, tmp_path):
    """As in `sfa predict ... | head`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sfa_dist.tools.cli", "predict", str(place / "long.mp4"), "--timeline"]
    with os.fdopen(write, "wb") as closed:
        finished = subprocess.run(
            [*command, "--run", str(place / "done"), "--out", str(tmp_path)],
            cwd=ROOT,
            env=dict(os.environ) | ONE_THREAD,
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert finished.returncode == 0, finished.stderr
    assert "error" not in finished.stderr
    assert len(json.loads((tmp_path / "long.timeline.json").read_text())["windows"]) == 1


def test_a_stream_is_told_as_it_comes_and_ended_by_ctrl_c(place, tmp_path):
    """A pipe by name that stays open: windows come before its end, and Ctrl-C leaves whole files and exit code 0."""
    fifo = tmp_path / "camera.mkv"
    os.mkfifo(fifo)
    frames = [blocks(number, 24, 32) for number in range(60)]
    data = encode_as("libx264", container="matroska", frames=frames, options={"preset": "ultrafast", "bf": "0"})
    over = threading.Event()

    def camera() -> None:
        with fifo.open("wb") as out:
            out.write(data)
            out.flush()
            over.wait(120)

    command = [*(sys.executable, "-m", "sfa_dist.tools.cli", "predict", str(fifo), "--run", str(place / "done"))]
    process = subprocess.Popen(
        [*command, "--timeline", "--out", str(tmp_path), "--json"],
        cwd=ROOT,
        env=dict(os.environ) | ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    feeder = threading.Thread(target=camera, daemon=True)
    feeder.start()
    assert process.stdout
    assert process.stderr
    first = json.loads(process.stdout.readline())
    assert first["start"] == 0.0
    lines = [first, json.loads(process.stdout.readline())]
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        over.set()
        process.kill()
    assert process.returncode == 0, err
    written = json.loads((tmp_path / "camera.timeline.json").read_text())
    assert written["windows"] == [*lines, *map(json.loads, out.splitlines())]
    assert (tmp_path / "camera.timeline.png").is_file()

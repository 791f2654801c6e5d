"""Final weights that are damaged and checkpoints that are gone, in real runs: refused by name, never trained on."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import TRAIN, assert_refused, sfa, train
from tiny_runs import SHORT, make_workplace

START = ("--recipe", "t.yaml", "--run-dir")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace, and a finished run in `whole`."""
    folder = make_workplace(tmp_path_factory.mktemp("lost"), SHORT)
    assert train(folder, *START, "whole").code == 0
    return folder


@pytest.fixture
def run(place: Path) -> str:
    """The name of a copy of the finished run."""
    shutil.rmtree(place / "run", ignore_errors=True)
    shutil.copytree(place / "whole", place / "run")
    return "run"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 2
    path.write_bytes(data)


def swap(path: Path) -> None:
    """For the same tensors of another run."""
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))


@pytest.mark.parametrize("damage", [flip, swap, Path.unlink], ids=lambda damage: damage.__name__)
def test_stage_2_does_not_begin_on_damaged_weights(place: Path, run: str, damage: Callable[[Path], object]) -> None:
    shutil.rmtree(place / run / "stage2")
    damage(place / run / "stage1" / "weights.safetensors")
    refused = train(place, *START, run, "--stage", "stage2")
    assert_refused(refused, 74, "stage1/weights.safetensors")
    assert not (place / run / "stage2").exists()


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_nobody_takes_damaged_weights(place: Path, run: str, stage: str) -> None:
    flip(place / run / stage / "weights.safetensors")
    named = f"{stage}/weights.safetensors is damaged or another run's"
    assert_refused(train(place, *START, run, "--stage", "test"), 74, named)
    assert_refused(sfa(place, "evaluate", run), 74, named)
    clip = place / "clip.mp4"
    clip.write_bytes(b"")
    assert_refused(sfa(place, "predict", str(clip), "--run", run, "--device", "cpu"), 74, named)
    (place / run / stage / "done.json").unlink()  # As the advice has it: from the last checkpoint.
    if stage == "stage1":
        assert train(place, *START, run, "--stage", stage).code == 0
        whole, again = (place / name / stage / "weights.safetensors" for name in ("whole", run))
        assert whole.read_bytes() == again.read_bytes()


def test_given_weights_are_checked_by_the_sum_beside_them(place: Path, run: str) -> None:
    given = place / "given.safetensors"
    shutil.copy(place / run / "stage1" / "weights.safetensors", given)
    (place / "given.safetensors.sha256").write_text("0" * 64 + "  given.safetensors\n")
    shutil.rmtree(place / "other", ignore_errors=True)
    arguments = (*START, "other", "--stage", "stage2", "--set", f"stage1.weights={given}")
    assert_refused(train(place, *arguments), 74, "given.safetensors.sha256 beside it says 0000")


@pytest.mark.parametrize("away", ["removed", "dangling"])
def test_checkpoints_that_are_gone_are_no_new_start(place: Path, run: str, away: str) -> None:
    folder = place / run / "stage1" / "checkpoints"
    (place / run / "stage1" / "done.json").unlink()
    shutil.rmtree(folder)
    if away == "dangling":
        folder.symlink_to("/nowhere/at all")
    for _ in range(2):
        refused = train(place, *START, run, "--stage", "stage1")
        assert_refused(refused, 74, "stage1 was at step 3", "the last of step 3", "is the disk mounted", "to start the")
    shutil.rmtree(place / run / "stage1")
    again = train(place, *START, run, "--stage", "stage1")
    assert again.code == 0, again.err
    assert "starts over from step 0" in " ".join(again.out.split())
    whole = place / "whole" / "stage1" / "weights.safetensors"
    assert (place / run / "stage1" / "weights.safetensors").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_process_that_only_imports_yet_says_that_it_was_stopped(place: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-X", "importtime", TRAIN, *START, "early"]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        until, imported = time.monotonic() + 60, ""
        while "sfa_dist.parallel.process_exit" not in imported:
            imported = process.stderr.readline()
            assert time.monotonic() < until
        process.stderr.readline()  # The next import comes after `exit_when_asked`.
        process.send_signal(number)
        told = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.returncode == 75
    assert len(told) == 1, told
    assert told[0].startswith("stopped: ")  # In one of two ways, by how far it is when the signal comes.
    assert f"by {number.name}" in told[0]

"""A disk that fills up changes nothing of how a run ends: its cause or its success, told as on any other disk."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from commands import Finished, Train, train
from tiny_runs import RECIPE, make_workplace, sets

from sfa_dist.chaos import injectors
from sfa_dist.data.shards.shard_index import load_index

pytestmark = pytest.mark.skipif(not injectors.can_mount(), reason="no mounts of one's own here")

RUN = (
    RECIPE[: RECIPE.index("image:\n")].replace("epochs: 2", "epochs: 1")
    + 'stage1: {frames: 4}\nlog: {every: 1, wandb: "off"}\n'
)
START = ("--recipe", "t.yaml", "--run-dir", "disk/run")
STAGE = (*START, "--stage", "stage1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace, and a finished run in `whole`."""
    place = make_workplace(tmp_path_factory.mktemp("full"), RUN)
    assert train(place, "--recipe", "t.yaml", "--run-dir", "whole").code == 0
    return place


@pytest.fixture
def place(made: Path) -> Path:
    for name in ("disk", "disk.state"):
        shutil.rmtree(made / name, ignore_errors=True)
        (made / name).mkdir()
    return made


def on_full_disk(place: Path, *arguments: str, after: str = "", more: str = "") -> Finished:
    fault = f"full_disk {place / 'disk'}" + (f" after {after}" if after else "")
    return train(place, *arguments, TEST_FAULTS=f"{fault};{more}")


def assert_ended(finished: Finished, code: int, *words: str) -> None:
    """The code; before the line of the error, if there is one, only what could not be written."""
    assert finished.code == code, (finished.code, finished.err)
    *told, last = finished.err.splitlines() or [""]
    if code == 0:
        told, last = [*told, last], ""
    for word in words:
        assert word in last, finished.err
    for line in filter(None, told):
        assert "is not written: no space left" in line or "cannot be written" in line or "lacks its last" in line, line
    assert sum("is not written" in line for line in told) <= 1, told


def test_0_of_what_was_done_before(place: Path) -> None:
    shutil.copytree(place / "whole", place / "disk.state" / "run")
    assert_ended(on_full_disk(place, *STAGE), 0)


def test_0_of_a_stage_that_has_just_been_done(place: Path) -> None:
    finished = on_full_disk(place, *STAGE, after="stages.pipeline.write_done")
    assert_ended(finished, 0)
    assert "attempts.json is not written: no space left" in finished.err


def test_0_of_a_run_whose_report_finds_no_room(place: Path) -> None:
    finished = on_full_disk(place, *START, after="stages.pipeline.test")
    assert finished.code == 0, finished.err
    assert "the report is not written: no space left" in finished.err
    assert "sfa report" in finished.err
    asked = on_full_disk(place, *START, "--stage", "report", after="run.lock._self")
    assert_ended(asked, 74, "no space left")


def test_65(place: Path) -> None:
    shutil.copytree(place / "train", place / "disk.state" / "train")
    shard = next((place / "disk.state" / "train").glob("*.tar"))
    index = load_index([shard])
    data = bytearray(shard.read_bytes())
    data[int(index.offset[0]) + 40] ^= 255
    shard.write_bytes(data)
    own = sets("data.train=['disk/train/*.tar']", "data.max_bad_fraction=0")
    assert_ended(on_full_disk(place, *STAGE, *own), 65, "1 of ", "over data.max_bad_fraction")


def test_70(place: Path) -> None:
    kill = f"decoder SIGSEGV@{int(load_index([place / 'train/part-000000.tar']).crc32[2])}"
    finished = on_full_disk(place, *STAGE, *sets("data.workers=1"), more=kill)
    assert_ended(
        finished, 70, "ended by SIGSEGV at clip part-000000.tar/clip002", "cannot add the clip", "run the same"
    )


@pytest.mark.parametrize("after", ["", "stages.pipeline.prepare"])
def test_74_keeps_what_the_save_says(place: Path, after: str) -> None:
    finished = on_full_disk(place, *STAGE, after=after)
    assert_ended(finished, 74, "rank 0 on ", "could not write", "step-00000003.tmp", "needed", "have 0.0 MiB")


def test_75(place: Path) -> None:
    fault = f"full_disk {place / 'disk'};decoder slow 1000"
    started = Train(place, *STAGE, TEST_FAULTS=fault)
    out = started._files[0]
    started.signal_when(lambda: out.is_file() and "optimizer state" in out.read_text(), signal.SIGTERM)
    assert_ended(started.wait(), 75, "stopped at step 0 of 3; nothing to save yet")


def test_78(place: Path) -> None:
    shutil.copytree(place / "whole", place / "disk.state" / "run")
    assert_ended(on_full_disk(place, *STAGE, "--set", "seed=7"), 78, "seed: was 0, now 7")
    again = train(place, "--recipe", "t.yaml", "--run-dir", "whole", "--stage", "stage1")
    assert again.code == 0
    assert json.loads((place / "whole" / "attempts.json").read_text())[-1]["code"] == 0

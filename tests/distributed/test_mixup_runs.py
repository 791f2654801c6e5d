"""Runs with mixup: the same losses on one rank and on two, and on many as on one; a killed one goes on exactly."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from commands import Train, train, train_ranks
from tiny_runs import RECIPE, START, events, losses, make_workplace, sets

from sfa_dist.checkpoint import file_sha256

MIXED = (
    RECIPE[: RECIPE.index("image:\n")]
    .replace("batch: {size: 8, micro: 2}", "augment: {mixup: {alpha: 0.3}}\nbatch: {size: 4, micro: 4}")
    .replace("lr: 0.3}", "lr: 0.1, label_smoothing: 0.3}\ncheckpoint: {every_steps: 2}")
    + """\
stage1: {frames: 4}
stage2: {frames: 8, chunk_frames: 4}
log: {every: 1, wandb: "off"}
"""
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("mixup"), MIXED)


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """One rank, four clips at a time."""
    finished = train(place, *START, "whole")
    assert finished.code == 0, finished.err
    return place / "whole"


@pytest.mark.parametrize(("ranks", "micro"), [(2, 2), (4, 4)], ids=["2 ranks x 2", "4 ranks, each of which gets 1"])
def test_the_same_losses_on_any_ranks(place: Path, whole: Path, ranks: int, micro: int) -> None:
    """With one clip at a time too, where the official mixup of a device's own clips does nothing."""
    for rank in train_ranks(ranks, place, *START, f"on {ranks}", *sets(f"batch.micro={micro}")):
        finished = rank.wait()
        assert finished.code == 0, finished.err
        if ranks == 4 and finished.out:
            assert "4 = 4 ranks x 1 x 1 accumulated" in finished.out
    expected = losses(whole)
    found = losses(place / f"on {ranks}")
    assert found.keys() == expected.keys()
    for key, (loss, norm) in found.items():
        assert (loss, norm) == (pytest.approx(expected[key][0], rel=1e-4), pytest.approx(expected[key][1], rel=1e-3))


def test_it_is_another_run_than_one_without(place: Path, whole: Path) -> None:
    finished = train(place, *START, "plain", *sets("augment.mixup=null"))
    assert finished.code == 0, finished.err
    plain, mixed = losses(place / "plain"), losses(whole)
    assert all(plain[key] != mixed[key] for key in mixed)
    refused = train(place, *START, "plain", *sets("augment.mixup.alpha=0.1"))
    assert (refused.code, "augment.mixup" in refused.err) == (78, True)


@pytest.mark.fault(2)
def test_a_killed_run_goes_on_exactly(place: Path, whole: Path) -> None:
    run = place / "killed"
    started = Train(place, *START, "killed")
    started.signal_when((run / "stage1" / "checkpoints" / "step-00000002").exists, signal.SIGKILL)
    assert started.wait().code == -signal.SIGKILL
    finished = train(place, *START, "killed")
    assert finished.code == 0, finished.err
    assert events(run, "resume")
    assert losses(run) == losses(whole)
    for stage in ("stage1", "stage2"):
        assert file_sha256(run / stage / "weights.safetensors") == file_sha256(whole / stage / "weights.safetensors")


def test_over_a_device_of_one_clip_is_refused(place: Path) -> None:
    finished = train(place, *START, "none", *sets("augment.mixup.over=device", "batch.micro=1"))
    assert (finished.code, "use over: global" in finished.err) == (78, True)

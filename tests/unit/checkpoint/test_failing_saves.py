"""What the disk refuses is told, and nothing is lost by a save that fails."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from checkpoint_samples import OneRankEngine, Save, names, newest
from whole_save import save_checkpoint

from sfa_dist import checkpoint as ckpt
from sfa_dist.checkpoint import saver as saver_module
from sfa_dist.checkpoint.failpoints import POINTS
from sfa_dist.errors import CheckpointError, LostRankError
from sfa_dist.parallel.runtime import Runtime

WORDS = {
    "enospc": r"no space left, needed \d+\.\d MiB, have \d+\.\d MiB at ",
    "edquot": "the disk quota is used up",
    "erofs": "mounted read-only",
    "eio": "input/output error",
    "eacces": "permission denied",
    "estale": "stale file handle",
}
AFTER_THE_RENAME = ("save.after_rename", "save.after_purge")


@pytest.mark.fault(18, 19)
@pytest.mark.parametrize(
    ("point", "name"),
    [(point, "enospc") for point in POINTS if point.startswith("save.")] + [("save.write", name) for name in WORDS],
)
def test_what_the_disk_refuses_is_told_and_older_ones_stay(save: Save, root: Path, point: str, name: str) -> None:
    save(1)
    save(2, mark="old")
    with pytest.raises(CheckpointError, match=WORDS[name]) as caught:
        save(2, failpoints=f"{point}:{name}@step=2", mark="new")
    assert caught.value.exit_code == 74
    said = str(caught.value)
    assert said.startswith("rank 0 on ")
    assert str(root) in said
    assert "older checkpoints are untouched" in said
    assert "\n" not in said
    found, faults = ckpt.newest_valid(root)
    assert found is not None
    assert ckpt.read_state(found)["mark"] == ("new" if point in AFTER_THE_RENAME else "old")
    assert faults == []
    assert not list(root.glob("*.tmp"))  # What is half written would keep the disk full.
    save(3)
    assert newest(root) == "step-00000003"


@pytest.mark.fault(18)
def test_the_room_is_looked_at_before_anything_is_written(
    save: Save, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(1)
    monkeypatch.setattr(saver_module, "free_bytes", lambda _: 100)
    with pytest.raises(CheckpointError, match=r"no space left, needed 0\.0 MiB, have \d+\.\d MiB at "):
        save(2)
    assert names(root) == ["step-00000001"]


@pytest.mark.fault(18)
def test_a_small_disk_that_is_really_full(runtime: Runtime, tmp_path: Path) -> None:
    """A file system of 2 MB in memory: one checkpoint fits, two do not."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        engine = OneRankEngine(size=(400, 400))  # 625 KiB of masters and as much of moments.
        engine.step(0.1)
        root = place / "checkpoints"
        save_checkpoint(root, 1, engine, {}, runtime, keep=2)
        with pytest.raises(CheckpointError, match=r"no space left, needed 1\.2 MiB, have 0\.\d MiB at "):
            save_checkpoint(root, 2, engine, {}, runtime, keep=2)
        assert newest(root) == "step-00000001"
        saver = ckpt.Saver(root, runtime, keep=2)
        with pytest.MonkeyPatch.context() as patch:  # It fills up on the way, behind the first look.
            patch.setattr(saver_module, "free_bytes", lambda _: 2**30)
            saver.begin(2, engine, {})
            with pytest.raises(CheckpointError, match="no space left, needed 1"):
                saver.finish()
        assert names(root) == ["step-00000001"]
        assert newest(root) == "step-00000001"
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.fault(19)
def test_a_disk_that_is_really_read_only(runtime: Runtime, engine: OneRankEngine, tmp_path: Path) -> None:
    place = tmp_path / "fixed"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=2m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a read-only disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(CheckpointError, match=r"mounted read-only \(EROFS\) at "):
            save_checkpoint(place / "checkpoints", 1, engine, {}, runtime, keep=2)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_folder_that_cannot_be_made_is_a_checkpoint_error(save: Save, root: Path) -> None:
    root.write_text("a file stands here")
    with pytest.raises(CheckpointError, match="could not prepare"):
        save(1)


def test_an_error_of_our_own_is_not_called_the_disks(save: Save, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(1)

    def broken(*_: Any) -> None:
        raise KeyError("head")

    monkeypatch.setattr(saver_module, "write_part", broken)
    with pytest.raises(LostRankError, match="KeyError: 'head'"):
        save(2)
    assert names(root) == ["step-00000001"]


@pytest.mark.fault(64)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["master", "exp_avg"])
def test_what_is_not_finite_is_not_saved(
    runtime: Runtime, save: Save, engine: OneRankEngine, root: Path, key: str, value: float
) -> None:
    save(1)
    list(engine.fragments())[2].tensors[key][-1] = value
    saver = ckpt.Saver(root, runtime, keep=1)
    saver.begin(2, engine, {})
    outcome = saver.finish()
    assert outcome is not None
    assert outcome.refused == f"{key} of bias is not finite on rank 0"
    assert names(root) == ["step-00000001"]
    with pytest.raises(CheckpointError, match="not finite"):
        save_checkpoint(root, 2, engine, {}, runtime, keep=1)
    assert names(root) == ["step-00000001"]

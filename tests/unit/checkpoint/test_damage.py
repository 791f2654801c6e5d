"""The newest intact checkpoint is found, whatever has become of the others."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import OneRankEngine, Save, names, newest
from safetensors.torch import save_file

from sfa_dist import checkpoint as ckpt
from sfa_dist.checkpoint.failpoints import parse_failpoints
from sfa_dist.errors import CheckpointError, RecipeError
from sfa_dist.parallel.runtime import Runtime


class Trap:
    """Ends the process of who unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (99,)


PICKLE = pickle.dumps(Trap())


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


def cut(path: Path) -> None:
    file = path / "optimizer-00000-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def change_the_state(path: Path) -> None:
    file = path / "state.json"
    file.write_text(file.read_text().replace('"t"', '"u"'))


def remove(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).unlink()

    return damage


def list_the_manifest(path: Path) -> None:
    (path / "MANIFEST.json").write_text("[]")


def garble_the_manifest(path: Path) -> None:
    (path / "MANIFEST.json").write_text('{"files": [1')


def empty_the_manifest(path: Path) -> None:
    (path / "MANIFEST.json").write_text('{"format": 1, "files": {}}')


def rewrite_the_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """As somebody would who wants a changed file to be taken for intact."""
    manifest = json.loads((path / "MANIFEST.json").read_text())
    change(manifest["files"])
    (path / "MANIFEST.json").write_text(json.dumps(manifest))


def list_another_folders_file(path: Path) -> None:
    secret = path.parent / "secret"
    secret.write_text("x")
    described = {"size": 1, "sha256": ckpt.file_sha256(secret)}
    rewrite_the_manifest(path, lambda files: files.update({"../secret": described}))


def list_an_unknown_file(path: Path) -> None:
    (path / "run.pkl").write_bytes(PICKLE)
    described = {"size": len(PICKLE), "sha256": ckpt.file_sha256(path / "run.pkl")}
    rewrite_the_manifest(path, lambda files: files.update({"run.pkl": described}))


def put_a_pickle(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(PICKLE)
    described = {"size": len(PICKLE), "sha256": ckpt.file_sha256(file)}
    rewrite_the_manifest(path, lambda files: files.update({file.name: described}))


def link_a_file(path: Path) -> None:
    file = path / "model.safetensors"
    file.rename(path.parent / "elsewhere")
    file.symlink_to(path.parent / "elsewhere")


def link_the_folder(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def nest_the_manifest(path: Path) -> None:
    (path / "MANIFEST.json").write_text("[" * 100_000)


def tell_another_format(path: Path) -> None:
    manifest = json.loads((path / "MANIFEST.json").read_text())
    (path / "MANIFEST.json").write_text(json.dumps({**manifest, "format": 1}))


def tell_no_hash(path: Path) -> None:
    rewrite_the_manifest(path, lambda files: files.update({"state.json": {"size": 1, "sha256": None}}))


DAMAGES = {
    "flipped bit": (flip_a_bit, "model.safetensors"),
    "cut file": (cut, "optimizer-00000-of-00001.safetensors"),
    "changed state": (change_the_state, "state.json"),
    "missing file": (remove("optimizer-00000-of-00001.safetensors"), "optimizer-00000-of-00001.safetensors"),
    "missing manifest": (remove("MANIFEST.json"), "MANIFEST.json"),
    "garbled manifest": (garble_the_manifest, "MANIFEST.json"),
    "list as manifest": (list_the_manifest, "MANIFEST.json"),
    "empty manifest": (empty_the_manifest, "MANIFEST.json"),
    "nested manifest": (nest_the_manifest, "MANIFEST.json"),
    "manifest of another format": (tell_another_format, "MANIFEST.json"),
    "manifest without a hash": (tell_no_hash, "MANIFEST.json"),
    "manifest that leaves the folder": (list_another_folders_file, "MANIFEST.json"),
    "manifest of other files": (list_an_unknown_file, "MANIFEST.json"),
    "a pickle in place of the model": (put_a_pickle, "model.safetensors"),
    "linked file": (link_a_file, "model.safetensors"),
    "linked folder": (link_the_folder, "MANIFEST.json"),
}
each_damage = pytest.mark.parametrize(("damage", "file"), DAMAGES.values(), ids=DAMAGES)


@pytest.mark.fault(20, 21, 22, 25)
@each_damage
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    save: Save, root: Path, damage: Callable[[Path], None], file: str
) -> None:
    save(1)
    save(2)
    damage(save(3))
    found, faults = ckpt.newest_valid(root)
    assert found == root / "step-00000002"
    assert len(faults) == 1
    assert "step-00000003" in faults[0]
    assert file in faults[0]


@pytest.mark.fault(22, 25)
@each_damage
def test_a_run_is_not_started_over_where_all_are_damaged(
    save: Save, root: Path, damage: Callable[[Path], None], file: str
) -> None:
    for step in (1, 2):
        for elsewhere in root.glob("elsewhere"):
            elsewhere.rename(root / "elsewhere still")
        damage(save(step))
    with pytest.raises(CheckpointError, match=r"no checkpoint under .* is intact") as caught:
        ckpt.newest_valid(root)
    assert file in str(caught.value)
    assert "remove them to start over" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_after_a_fallback_the_damaged_one_does_not_outlive_the_good_ones(save: Save, root: Path) -> None:
    """Steps beyond the present one are of a course that was left: kept, they would push out what is good."""
    save(1)
    flip_a_bit(save(3))
    assert newest(root) == "step-00000001"
    save(2, keep=1)
    assert names(root) == ["step-00000002"]


def test_after_going_back_to_an_older_one_the_newer_ones_are_not_resumed(save: Save, root: Path) -> None:
    for step in (1, 2, 3):
        save(step, mark="left")
    path = save(2, mark="new")
    assert newest(root) == "step-00000002"
    assert ckpt.read_state(path)["mark"] == "new"


@pytest.mark.fault(25)
@pytest.mark.parametrize("text", ["{", "[1]", "", '[["format", 2]]', "2", '{"format": 1}', "[" * 100_000])
def test_a_state_that_cannot_be_read_is_a_checkpoint_error(save: Save, text: str) -> None:
    path = save(1)
    (path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        ckpt.read_state(path)


def test_parameters_that_cannot_be_read_are_a_checkpoint_error(save: Save) -> None:
    path = save(1)
    (path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ckpt.read_parameters(path)


@pytest.mark.fault(23)
@pytest.mark.parametrize("text", ["", "step-00000001", "../elsewhere"])
def test_what_a_file_called_latest_says_does_not_count(save: Save, root: Path, text: str) -> None:
    save(1)
    save(2)
    (root / "latest").write_text(text)
    assert newest(root) == "step-00000002"


@pytest.mark.fault(31)
def test_clocks_do_not_count(save: Save, root: Path) -> None:
    save(1)
    save(2)
    for path in root.rglob("*"):
        os.utime(path, (0, 0) if "step-00000002" in str(path) else None)
    assert newest(root) == "step-00000002"
    save(3, keep=2)
    assert names(root) == ["step-00000002", "step-00000003"]


@pytest.mark.fault(30)
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", ["estale", "eio"])
def test_a_disk_that_recovers_is_waited_for(save: Save, root: Path, name: str) -> None:
    path = save(1)
    for read in (
        lambda failpoints: ckpt.newest_valid(root, failpoints=failpoints)[0] == path,
        lambda failpoints: bool(ckpt.read_parameters(path, failpoints)),
        lambda failpoints: ckpt.load_engine(path, OneRankEngine(), 1, failpoints) is None,
    ):
        assert read(parse_failpoints(f"load.read:{name}@times=2"))
        with pytest.raises(CheckpointError, match=r"cannot read .*step-00000001.*(ESTALE|EIO)"):
            read(parse_failpoints(f"load.read:{name}@times=3"))


@pytest.mark.fault(30)
@pytest.mark.usefixtures("impatient")
def test_one_that_goes_away_between_choice_and_load(save: Save, root: Path) -> None:
    path, _ = save(1), save(2)
    shutil.rmtree(path)
    with pytest.raises(CheckpointError, match=r"cannot read .*step-00000001: it is missing"):
        ckpt.read_parameters(path)
    with pytest.raises(CheckpointError, match="is missing"):
        ckpt.load_engine(path, OneRankEngine(), 1)


@pytest.mark.fault(26)
def test_another_dtype_is_refused(save: Save, engine: OneRankEngine, root: Path) -> None:
    """Intact by its hash, but not what was saved: a cast in silence would lose bits."""
    path = save(1)
    file = path / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in engine.full_parameters().items()}, file)
    described = {"size": file.stat().st_size, "sha256": ckpt.file_sha256(file)}
    rewrite_the_manifest(path, lambda files: files.update({file.name: described}))
    assert newest(root) == path.name
    for read in (lambda: ckpt.read_parameters(path), lambda: ckpt.load_engine(path, OneRankEngine(), 1)):
        with pytest.raises(RecipeError, match=r"(bias|weight) is BF16, not F32"):
            read()


@pytest.mark.fault(25)
def test_moments_that_are_there_twice_are_refused(save: Save, engine: OneRankEngine) -> None:
    path = save(1)
    moments = {f"weight/{start}/exp_avg": torch.zeros(n) for start, n in ((0, 7), (6, 9), (0, 15))}
    save_file({**moments, "bias/0/exp_avg": torch.zeros(5)}, path / "optimizer-00000-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="exp_avg of weight twice at element"):
        ckpt.load_engine(path, engine, 1)


@pytest.mark.fault(3, 32)
def test_damaged_ones_are_not_counted_among_those_that_are_kept(save: Save, root: Path) -> None:
    """A new process does not know which older ones are intact: it looks."""
    for step in (1, 2, 3, 4):
        save(step, keep=9)
    flip_a_bit(root / "step-00000003")
    (root / "step-00000004" / "MANIFEST.json").unlink()
    save(5, keep=3)
    assert names(root) == ["step-00000001", "step-00000002", "step-00000005"]


@pytest.mark.fault(32)
def test_one_that_is_damaged_later_is_seen_by_its_size(runtime: Runtime, engine: OneRankEngine, root: Path) -> None:
    saver = ckpt.Saver(root, runtime, keep=2)
    for step in (1, 2):
        saver.begin(step, engine, {})
        saver.finish()
    cut(root / "step-00000002")
    saver.begin(3, engine, {})
    saver.finish()
    assert names(root) == ["step-00000001", "step-00000003"]

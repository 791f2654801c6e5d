"""Checkpoints: whole or not there, the newest intact one found, and nothing lost by a save that fails."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sfa_dist import checkpoint as ckpt
from sfa_dist.errors import CheckpointError
from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.engine import Engine, Fragment
from sfa_dist.parallel.runtime import Runtime


class OneRankEngine:
    """An engine of one rank around a plain torch optimizer's state: the whole protocol, no library."""

    replicated = True

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.module: nn.Module = nn.Linear(3, 5)
        self.moments: dict[str, dict[str, Tensor]] = {}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.module(inputs)

    def evaluate(self, inputs: Tensor) -> Tensor:
        return self.module(inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        raise NotImplementedError

    def step(self, lr: float) -> float:
        self.make_optimizer_state(0)
        for name, parameter in self.module.named_parameters():
            self.moments[name]["exp_avg"].normal_()
            parameter.detach().view(-1).sub_(lr * self.moments[name]["exp_avg"])
        return 1.0

    def fragments(self) -> Iterator[Fragment]:
        """Each parameter in two pieces, as two ranks would own it."""
        for name, parameter in self.module.named_parameters():
            flat = parameter.detach().view(-1)
            half = flat.numel() // 2
            for start, numel in ((0, half), (half, flat.numel() - half)):
                moments = {key: value[start : start + numel] for key, value in self.moments.get(name, {}).items()}
                yield Fragment(name, start, numel, {"master": flat[start : start + numel], **moments})

    def make_optimizer_state(self, step: int) -> None:
        self.moments = {name: {"exp_avg": torch.zeros(p.numel())} for name, p in self.module.named_parameters()}

    def full_parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    def optimizer_bytes(self) -> int:
        return 0

    def state(self) -> list[Tensor]:
        return [tensor for piece in self.fragments() for _, tensor in sorted(piece.tensors.items())]


Save = Callable[..., Path]


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    yield parallel_runtime.start({})
    parallel_runtime.stop()


@pytest.fixture
def engine() -> OneRankEngine:
    engine = OneRankEngine()
    engine.step(0.1)
    return engine


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def save(runtime: Runtime, engine: Engine, root: Path) -> Save:
    def save(step: int, keep: int = 3, **state: Any) -> Path:
        return ckpt.save_checkpoint(root, step, engine, {"stage": "t", **state}, runtime, keep)

    return save


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def newest(root: Path) -> str:
    path, _ = ckpt.newest_valid(root)
    assert path is not None
    return path.name


# ------------------------------------------------------------------------------------------------ a good save


def test_a_checkpoint_has_the_files_of_the_contract(save: Save, root: Path) -> None:
    path = save(120, progress={"step": 120})
    assert path == root / "step-00000120"
    assert names(path) == [
        "MANIFEST.json",
        "model.safetensors",
        "optimizer-00000-of-00001.safetensors",
        "state.json",
    ]
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert sorted(manifest["files"]) == names(path)[1:]
    for name, facts in manifest["files"].items():
        assert facts == {"size": (path / name).stat().st_size, "sha256": ckpt.file_sha256(path / name)}
    assert ckpt.read_state(path) == {"format": 1, "step": 120, "stage": "t", "progress": {"step": 120}}


def test_what_is_loaded_is_what_was_saved_to_the_last_bit(save: Save, engine: OneRankEngine) -> None:
    path = save(1)
    other = OneRankEngine(seed=1)
    ckpt.load_engine(path, other, step=1)
    assert len(other.state()) == 8
    assert all(torch.equal(a, b) for a, b in zip(engine.state(), other.state(), strict=True))
    assert all(torch.equal(ckpt.read_parameters(path)[name], p) for name, p in engine.module.named_parameters())


def test_moments_are_named_by_parameter_and_place(save: Save) -> None:
    with safe_open(save(1) / "optimizer-00000-of-00001.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["bias/0/exp_avg", "bias/2/exp_avg", "weight/0/exp_avg", "weight/7/exp_avg"]


def test_pieces_may_be_cut_anew(save: Save, engine: OneRankEngine) -> None:
    """What two ranks saved, one rank loads."""
    path = save(1)

    class Whole(OneRankEngine):
        def fragments(self) -> Iterator[Fragment]:
            for name, p in self.module.named_parameters():
                yield Fragment(name, 0, p.numel(), {"master": p.detach().view(-1), **self.moments[name]})

    whole = Whole(seed=1)
    ckpt.load_engine(path, whole, step=1)
    assert torch.equal(whole.moments["weight"]["exp_avg"], engine.moments["weight"]["exp_avg"])


def test_an_engine_that_needs_more_than_was_saved_is_refused(save: Save, engine: OneRankEngine) -> None:
    engine.moments = {}
    path = save(1)
    with pytest.raises(CheckpointError, match="lacks exp_avg of weight: 0 of 7 elements"):
        ckpt.load_engine(path, OneRankEngine(), step=1)


def test_the_newest_stay(save: Save, root: Path) -> None:
    for step in (1, 2, 9, 10, 11):
        save(step)
    assert names(root) == ["step-00000009", "step-00000010", "step-00000011"]
    save(12, keep=1)
    assert names(root) == ["step-00000012"]


def test_the_same_step_may_be_saved_again(save: Save, root: Path) -> None:
    save(1, mark="first")
    save(2, mark="first")
    path = save(2, mark="second")
    assert ckpt.read_state(path)["mark"] == "second"
    assert names(root) == ["step-00000001", "step-00000002"]
    assert ckpt.verify(path) is None


def test_saving_the_same_step_again_may_be_killed_at_any_moment(
    save: Save, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With keep 1 the one that is replaced is the only one: it goes when the new one stands."""

    class Killed(BaseException):
        pass

    save(3, keep=1, mark="first")
    rename = Path.rename

    def killed_before_the_new_one_stands(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_before_the_new_one_stands)
        with pytest.raises(Killed):
            save(3, keep=1, mark="second")
    found, faults = ckpt.newest_valid(root)
    assert found is not None
    assert (ckpt.read_state(found)["mark"], faults) == ("first", [])
    save(3, keep=1, mark="third")
    assert names(root) == ["step-00000003"]
    assert ckpt.read_state(root / "step-00000003")["mark"] == "third"


def test_a_file_of_a_rank_that_is_not_there_is_a_checkpoint_error(
    save: Save, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a network disk rank 0 may not see what another rank has written."""
    monkeypatch.setattr(ckpt, "write_tensors", lambda *_: None)
    with pytest.raises(CheckpointError, match=r"could not commit .*model\.safetensors"):
        save(1)
    assert ckpt.list_checkpoints(root) == []


def test_without_a_checkpoint_there_is_none(root: Path) -> None:
    assert ckpt.newest_valid(root) == (None, [])


def test_remains_of_a_save_that_was_killed_are_ignored_and_cleared_by_the_next(save: Save, root: Path) -> None:
    save(1)
    shutil.copytree(root / "step-00000001", root / "step-00000002.tmp")
    assert newest(root) == "step-00000001"
    save(3)
    assert names(root) == ["step-00000001", "step-00000003"]


def test_other_things_in_the_folder_are_left_alone(save: Save, root: Path) -> None:
    save(1)
    (root / "notes.txt").write_text("mine")
    (root / "step-1").mkdir()
    save(2, keep=1)
    assert newest(root) == "step-00000002"
    assert names(root) == ["notes.txt", "step-00000002", "step-1"]


# ------------------------------------------------------------------------------------------------ damage


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


DAMAGES = {
    "flipped bit": (flip_a_bit, "model.safetensors"),
    "cut file": (cut, "optimizer-00000-of-00001.safetensors"),
    "changed state": (change_the_state, "state.json"),
    "missing file": (remove("optimizer-00000-of-00001.safetensors"), "optimizer-00000-of-00001.safetensors"),
    "missing manifest": (remove("MANIFEST.json"), "MANIFEST.json"),
    "garbled manifest": (garble_the_manifest, "MANIFEST.json"),
    "list as manifest": (list_the_manifest, "MANIFEST.json"),
    "empty manifest": (empty_the_manifest, "MANIFEST.json"),
}
each_damage = pytest.mark.parametrize(("damage", "file"), DAMAGES.values(), ids=DAMAGES)


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


@each_damage
def test_a_run_is_not_started_over_where_all_are_damaged(
    save: Save, root: Path, damage: Callable[[Path], None], file: str
) -> None:
    for step in (1, 2):
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


@pytest.mark.parametrize("text", ["{", "[1]", ""])
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


# ------------------------------------------------------------------------------------------------ failing saves

FULL = {
    "OSError": OSError(errno.ENOSPC, "No space left on device"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_full_disk_is_a_checkpoint_error_and_older_ones_stay(
    save: Save, root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save(1)

    def save_file(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ckpt, "save_file", save_file)
        with pytest.raises(CheckpointError) as caught:
            save(2)
    assert caught.value.exit_code == 74
    assert "no space left on the device" in str(caught.value)
    assert "MiB free" in str(caught.value)
    assert str(root / "step-00000002") in str(caught.value)
    assert "older checkpoints are untouched" in str(caught.value)
    assert newest(root) == "step-00000001"
    save(2)
    assert names(root) == ["step-00000001", "step-00000002"]


def test_a_disk_that_fills_up_on_the_way_leaves_no_half_file(
    save: Save, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest is the last file written, so that a full disk there is the latest that a save can fail."""
    save(1)
    write_json = ckpt.write_json

    def fails_at_the_manifest(path: Path, value: Any) -> None:
        if path.name == "MANIFEST.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_json(path, value)

    monkeypatch.setattr(ckpt, "write_json", fails_at_the_manifest)
    with pytest.raises(CheckpointError, match="could not commit"):
        save(2, keep=1)
    assert newest(root) == "step-00000001"


def test_another_error_of_the_disk_is_told_as_it_is(save: Save, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_file(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ckpt, "save_file", save_file)
    with pytest.raises(CheckpointError, match=r"rank 0 on .* could not write .*Input/output error"):
        save(1)


def test_a_folder_that_cannot_be_made_is_a_checkpoint_error(save: Save, root: Path) -> None:
    root.write_text("a file stands here")
    with pytest.raises(CheckpointError, match="could not prepare"):
        save(1)


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_final_weights_on_a_full_disk_leave_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "stage1" / "weights.safetensors"
    ckpt.write_weights(path, {"a": torch.ones(2)}, {"stage": "old"})

    def save_file(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(ckpt, "save_file", save_file)
    with pytest.raises(CheckpointError, match="no space left on the device"):
        ckpt.write_weights(path, {"a": torch.zeros(2)}, {"stage": "new"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"stage": "old"}


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    """The next stage knows a weights file by its hash."""
    metadata = {f"key {n}": json.dumps(["\u00e4", '"', "\n", "\\", n]) for n in range(8)}
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2)}
    files = [tmp_path / f"{n}.safetensors" for n in range(6)]
    for file in files:
        ckpt.write_weights(file, tensors, metadata)
    assert len({ckpt.file_sha256(file) for file in files}) == 1
    with safe_open(files[0], framework="pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "done.json"
    ckpt.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        ckpt.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}

"""Checkpoints: whole or not there, the newest intact one found, and nothing lost by a save that fails."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfa_dist import checkpoint as ckpt
from sfa_dist.checkpoint import files, folder, writing
from sfa_dist.checkpoint import saver as saver_module
from sfa_dist.checkpoint.layout import plan_layout
from sfa_dist.checkpoint.writing import Written, begin_model, check_model
from sfa_dist.errors import CheckpointError, LostRankError, RecipeError
from sfa_dist.failpoints import NO_FAILPOINTS, POINTS, parse_failpoints
from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.engine import Engine, Fragment
from sfa_dist.parallel.runtime import Runtime


class OneRankEngine:
    """An engine of one rank around a plain torch optimizer's state: the whole protocol, no library."""

    owners = 1

    def __init__(self, seed: int = 0, size: tuple[int, int] = (3, 5)) -> None:
        torch.manual_seed(seed)
        self.module: nn.Module = nn.Linear(*size)
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

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.module.named_parameters()}

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


class Trap:
    """Ends the process of who unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (99,)


PICKLE = pickle.dumps(Trap())


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
    def save(step: int, keep: int = 3, failpoints: str = "", **state: Any) -> Path:
        saver = ckpt.Saver(root, runtime, keep, parse_failpoints(failpoints))
        saver.begin(step, engine, {"stage": "t", **state})
        outcome = saver.finish()
        assert outcome is not None
        assert outcome.refused is None
        return outcome.path

    return save


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RETRY_DELAYS_S", (0.0, 0.0))


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
    assert ckpt.read_state(path) == {"format": 2, "step": 120, "stage": "t", "progress": {"step": 120}}


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


def test_a_save_is_what_safetensors_would_write(save: Save, engine: OneRankEngine, tmp_path: Path) -> None:
    """The slow twin: the library's own writer, from whole tensors."""
    path = save(1)
    save_file(engine.full_parameters(), tmp_path / "model.safetensors")
    assert (path / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    moments = {f"{f.name}/{f.start}/exp_avg": f.tensors["exp_avg"].clone() for f in engine.fragments()}
    save_file(moments, tmp_path / "optimizer.safetensors")
    own = path / "optimizer-00000-of-00001.safetensors"
    assert own.read_bytes() == (tmp_path / "optimizer.safetensors").read_bytes()
    assert load_file(own).keys() == moments.keys()


@pytest.mark.fault(22)
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("size", [None, 3], ids=["missing", "short"])
def test_a_file_of_a_rank_that_rank_0_does_not_see_whole_is_not_committed(root: Path, size: int | None) -> None:
    """On a network disk rank 0 may not see what another rank has written."""
    name, layout = "optimizer-00001-of-00002.safetensors", plan_layout({})
    shelf = folder.Shelf(root, keep=1)
    temporary = shelf.names(1)[1]
    temporary.mkdir(parents=True)
    if size is not None:
        (temporary / name).write_bytes(b"x" * size)
    written = [Written({}, []), Written({name: {"size": 4, "sha256": "0" * 64}}, [])]
    with pytest.raises(OSError, match=name):
        shelf.commit(1, layout, written, NO_FAILPOINTS)
    assert ckpt.list_checkpoints(root) == []


SPANS = {
    "gap": ([(0, 8, 0), (12, 4, 0)], ValueError, "gap or overlap"),
    "overlap": ([(0, 8, 0), (4, 12, 0)], ValueError, "gap or overlap"),
    "not all": ([(0, 8, 0)], ValueError, "cover"),
    "other bytes": ([(0, 8, 0), (8, 8, 1)], OSError, "are not what was written"),
}


@pytest.mark.parametrize(("spans", "error", "words"), SPANS.values(), ids=SPANS)
def test_the_common_file_is_read_back_and_compared(
    tmp_path: Path, spans: list[tuple[int, int, int]], error: type[Exception], words: str
) -> None:
    """What a network disk makes of several writers shows before the checkpoint counts."""
    layout, data = plan_layout({"a": [4]}), bytes(range(16))
    file = tmp_path / "model.safetensors"
    begin_model(file, layout)
    with file.open("r+b") as stream:
        stream.seek(len(layout.header))
        stream.write(data)

    def told(start: int, size: int, spoiled: int) -> tuple[int, int, int]:
        return len(layout.header) + start, size, zlib.crc32(data[start : start + size]) ^ spoiled

    good = check_model(file, layout, [told(8, 8, 0), told(0, 8, 0)])
    assert good == {"size": layout.size, "sha256": ckpt.file_sha256(file)}
    with pytest.raises(error, match=words):
        check_model(file, layout, [told(*span) for span in spans])


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
    with pytest.raises(CheckpointError, match=r"cannot read .*step-00000001: it is not there \(any more\)"):
        ckpt.read_parameters(path)
    with pytest.raises(CheckpointError, match="not there"):
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
        with pytest.raises(RecipeError, match=r"(bias|weight) is BF16, wanted F32"):
            read()


@pytest.mark.fault(25)
def test_moments_that_are_there_twice_are_refused(save: Save, engine: OneRankEngine) -> None:
    path = save(1)
    moments = {f"weight/{start}/exp_avg": torch.zeros(n) for start, n in ((0, 7), (6, 9), (0, 15))}
    save_file({**moments, "bias/0/exp_avg": torch.zeros(5)}, path / "optimizer-00000-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="exp_avg of weight twice at element"):
        ckpt.load_engine(path, engine, 1)


# ------------------------------------------------------------------------------------------------ failing saves

FULL = {
    "OSError": OSError(errno.ENOSPC, "No space left on device"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}
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
        ckpt.save_checkpoint(root, 1, engine, {}, runtime, keep=2)
        with pytest.raises(CheckpointError, match=r"no space left, needed 1\.2 MiB, have 0\.\d MiB at "):
            ckpt.save_checkpoint(root, 2, engine, {}, runtime, keep=2)
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
            ckpt.save_checkpoint(place / "checkpoints", 1, engine, {}, runtime, keep=2)
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
        ckpt.save_checkpoint(root, 2, engine, {}, runtime, keep=1)
    assert names(root) == ["step-00000001"]


# ------------------------------------------------------------------------------------------------ in the background


def test_what_is_saved_is_what_was_there_at_the_boundary(
    runtime: Runtime, engine: OneRankEngine, root: Path, tmp_path: Path
) -> None:
    """And the same bytes as a save that is waited for."""
    state = {"progress": {"step": 1}}
    waited_for = ckpt.save_checkpoint(tmp_path / "twin", 1, engine, state, runtime, keep=1)
    saver = ckpt.Saver(root, runtime, keep=1)
    saver.begin(1, engine, state)
    state["progress"]["step"] = 2
    for tensor in engine.state():
        tensor.fill_(7.0)
    outcome = saver.finish()
    assert outcome is not None
    assert names(outcome.path) == names(waited_for)
    for name in names(waited_for):
        assert (outcome.path / name).read_bytes() == (waited_for / name).read_bytes(), name


def test_a_save_takes_its_turns_at_the_boundaries(runtime: Runtime, engine: OneRankEngine, root: Path) -> None:
    saver = ckpt.Saver(root, runtime, keep=1)
    assert saver.status() == (False, False)
    assert saver.advance(0, 0) is None
    saver.begin(1, engine, {})
    with pytest.raises(RuntimeError, match="in flight"):
        saver.begin(2, engine, {})
    outcome = None
    end = time.monotonic() + 60
    while outcome is None and time.monotonic() < end:
        outcome = saver.advance(*saver.status())
    assert outcome is not None
    assert (outcome.step, outcome.refused) == (1, None)
    assert 0 < outcome.blocked_seconds < outcome.seconds
    assert ckpt.verify(outcome.path) is None
    assert saver.status() == (False, False)
    assert saver.finish() is None


def test_a_rank_that_is_still_busy_holds_the_turn(runtime: Runtime, engine: OneRankEngine, root: Path) -> None:
    saver = ckpt.Saver(root, runtime, keep=1)
    saver.begin(1, engine, {})
    for _ in range(100):
        assert saver.advance(1, 0) is None  # As if another rank had not ended.
    assert ckpt.list_checkpoints(root) == []
    assert saver.finish() is not None


def test_a_failure_of_another_rank_calls_this_one_off(
    runtime: Runtime, engine: OneRankEngine, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = ckpt.Saver(root, runtime, keep=1)
    gathered: list[Any] = []

    def gather(self: Runtime, value: Any) -> list[Any]:
        gathered.append(value)
        return [value, ("disk", "rank 1 on b could not write c: d")]

    saver.begin(1, engine, {})
    monkeypatch.setattr(Runtime, "gather", gather)
    with pytest.raises(CheckpointError, match="rank 1 on b could not write c: d; older checkpoints are untouched"):
        saver.advance(1, 1)
    assert gathered == [None]
    assert names(root) == []


def test_a_save_that_is_abandoned_ends_soon_and_leaves_no_checkpoint(
    runtime: Runtime, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "CHUNK", 4)
    written: list[int] = []

    def slow(descriptor: int, data: memoryview, place: int) -> None:
        written.append(len(data))
        time.sleep(0.01)

    monkeypatch.setattr(writing, "_write_all", slow)
    engine = OneRankEngine(size=(500, 500))
    saver = ckpt.Saver(root, runtime, keep=1)
    saver.begin(1, engine, {})
    saver.abandon()
    end = time.monotonic() + 30
    while saver.status()[0]:
        assert time.monotonic() < end
        time.sleep(0.001)
    assert len(written) < 1000  # Of 250 000.
    assert ckpt.list_checkpoints(root) == []


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


# ------------------------------------------------------------------------------------------------ final weights


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_final_weights_on_a_full_disk_leave_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "stage1" / "weights.safetensors"
    ckpt.write_weights(path, {"a": torch.ones(2)}, {"stage": "old"})

    def save_file(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(files, "save_file", save_file)
    with pytest.raises(CheckpointError, match=r"no space left, needed 0\.0 MiB, have"):
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

"""A good save: the files of the contract, the same bits, the newest stay, remains are cleared."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_samples import OneRankEngine, Save, names, newest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sfa_dist import checkpoint as ckpt
from sfa_dist.checkpoint import folder
from sfa_dist.checkpoint.failpoints import NO_FAILPOINTS
from sfa_dist.checkpoint.layout import plan_layout
from sfa_dist.checkpoint.writing import Written, begin_model, check_model
from sfa_dist.errors import CheckpointError
from sfa_dist.parallel.engines.engine import Fragment


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
    shelf = folder.CheckpointDir(root, keep=1)
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

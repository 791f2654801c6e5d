"""Weights files are what was written, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sfa_dist.boundary.disk import file_sha256
from sfa_dist.checkpoint import write_weights
from sfa_dist.errors import CheckpointError, RecipeError
from sfa_dist.models import weights_file
from sfa_dist.models.image_vit import load_image_vit
from sfa_dist.models.vivit import Trunk
from sfa_dist.models.weights import load_exactly, read_state
from sfa_dist.models.weights_file import checked_sha256, read_metadata
from sfa_dist.recipe.blocks import ModelBlock
from sfa_dist.run.record import write_done

NAME = "weights.safetensors"
RESULT = dict.fromkeys(("steps", "seconds"), 1)


def stage(folder: Path, value: float = 1.0) -> Path:
    """A stage that is done, with final weights of this value."""
    described = write_weights(folder / NAME, {"a": torch.full((100,), value)}, {"stage": "stage1"})
    write_done(folder, {}, RESULT, {NAME: described})
    return folder / NAME


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "a bit of a tensor": lambda path, other: flip(path, -7),
    "a bit of the header": lambda path, other: flip(path, 9),
    "cut": lambda path, other: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path, other: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path, other: path.write_bytes(b""),
    "another run's": lambda path, other: path.write_bytes(other.read_bytes()),
    "missing": lambda path, other: path.unlink(),
    "record without its sum": lambda path, other: write_done(path.parent, {}, RESULT, {NAME: {"size": 3}}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("read", [read_state, read_metadata])
def test_damaged_weights_are_refused_by_name(tmp_path: Path, damage: Callable, read: Callable) -> None:
    path, other = stage(tmp_path / "a"), stage(tmp_path / "b", 2.0)
    read(path)
    damage(path, other)
    with pytest.raises(CheckpointError, match=f"{NAME}|done.json"):
        read(path)


def test_weights_of_before_have_no_sum_and_are_taken(tmp_path: Path) -> None:
    path = stage(tmp_path)
    (tmp_path / "done.json").write_text('{"inputs": {}, "result": {"steps": 3}}')
    assert torch.equal(read_state(path)["a"], torch.ones(100))
    (tmp_path / "done.json").unlink()
    assert read_metadata(path) == {"stage": "stage1"}


@pytest.mark.parametrize(
    "line",
    [
        "{digest}",
        "{digest}  weights.safetensors\n",
        "{digest} *./weights.safetensors\n",
        "SHA256 (weights.safetensors) = {digest}\n",
        "{other}  tail.safetensors\n{digest}  weights.safetensors\n",
        "# by the authors\n{digest}  weights.safetensors\n",
    ],
)
def test_a_list_of_sums_beside_given_weights_holds(tmp_path: Path, line: str) -> None:
    path = stage(tmp_path)
    (tmp_path / "done.json").unlink()
    digest = file_sha256(path)
    beside = tmp_path / f"{NAME}.sha256"
    beside.write_text(line.format(digest=digest.upper(), other="0" * 64))
    assert checked_sha256(path) == digest
    beside.write_text(line.format(digest="f" * 64, other="0" * 64))
    with pytest.raises(CheckpointError, match=r"weights\.safetensors\.sha256 beside it says ffff"):
        read_state(path)


@pytest.mark.parametrize("content", [b"", b"none", b"\xff\xfe", b"0" * 63, f"{'0' * 64} a\n{'1' * 64} b\n".encode()])
def test_a_list_that_tells_nothing_is_refused(tmp_path: Path, content: bytes) -> None:
    path = stage(tmp_path)
    (tmp_path / f"{NAME}.sha256").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.sha256"):
        read_state(path)


def test_a_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stage(tmp_path)
    hashed: list[Path] = []
    monkeypatch.setattr(weights_file, "file_sha256", lambda file: (hashed.append(file), file_sha256(file))[1])
    for _ in range(3):
        read_state(path)
        read_metadata(path)
    assert hashed == [path]


@pytest.mark.parametrize(
    "state",
    [
        {"patch_embed.proj.weight": torch.zeros(3)},
        {"patch_embed.proj.weight": torch.zeros(())},
        {"pos_embed": torch.zeros(5)},
        {"pos_embed": torch.zeros(1, 7, 3)},
        {"pos_embed": torch.zeros(())},
        {"cls_token": torch.zeros(1, 1, 3, dtype=torch.int64)},
        {7: torch.zeros(3)},
        {"a": [torch.zeros(3)]},
        {"a": torch.zeros(3).to_sparse()},
        [torch.zeros(3)],
        torch.zeros(3),
        {},
        None,
    ],
    ids=str,
)
def test_weights_of_any_shape_are_an_orderly_error(tmp_path: Path, state: object) -> None:
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    trunk = Trunk(ModelBlock(size="tiny", classes=2, width=24, depth=1, heads=2, mlp=32, patch=8, image_size=16))
    with pytest.raises((CheckpointError, RecipeError), match=r"weights\.pth"):
        load_image_vit(trunk, str(path))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"\x80\x05" + b"(" * 5000, bytes(100)])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_any_bytes_are_an_orderly_error(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    trunk = Trunk(ModelBlock(size="tiny", classes=2, width=24, depth=1, heads=2, mlp=32, patch=8, image_size=16))
    with pytest.raises((CheckpointError, RecipeError), match=r"weights\."):
        load_image_vit(trunk, str(path))


def test_numbers_that_are_none_are_not_cast() -> None:
    module = torch.nn.Linear(2, 2)
    for dtype in (torch.int64, torch.complex64, torch.bool):
        state = {key: value.detach().to(dtype) for key, value in module.state_dict().items()}
        with pytest.raises(RecipeError, match="of another type"):
            load_exactly(module, state, "a file")

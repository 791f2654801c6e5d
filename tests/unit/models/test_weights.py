"""Weights from image ViTs and files: mapped exactly, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from sfa_dist.errors import CheckpointError, RecipeError
from sfa_dist.models.image_vit import load_image_vit
from sfa_dist.models.vivit import Trunk, ViViT, build, normalise
from sfa_dist.models.weights import read_state, resize_grid_positions
from sfa_dist.recipe.blocks import ModelBlock

DIMS = {"width": 48, "depth": 2, "heads": 3, "mlp": 96, "patch": 8}


def trunk_for(image_size: int = 32, **changes: Any) -> Trunk:
    with torch.device("meta"):
        trunk = Trunk(
            ModelBlock.model_validate({"size": "tiny", "classes": 2, "image_size": image_size, **DIMS, **changes})
        )
    return build(trunk)  # type: ignore[return-value]


def image_vit(**changes: Any) -> nn.Module:
    torch.manual_seed(3)
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2, num_classes=7, **changes
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_file(image_vit().state_dict(), tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors"


def test_a_clip_of_one_image_gives_the_image_vits_features(saved: Path) -> None:
    """Central-frame initialisation: the tubelet's second frame is seen as the image, the first one is not seen."""
    trunk = trunk_for()
    load_image_vit(trunk, str(saved))
    image = torch.randn(2, 3, 32, 32)
    tubelets = torch.stack([torch.randn(2, 3, 32, 32), image], dim=2)
    expected = image_vit(act_layer=lambda: nn.GELU(approximate="tanh")).forward_features(image)[:, 0]
    torch.testing.assert_close(trunk.forward_tubelets(tubelets), expected, atol=1e-4, rtol=1e-4)


def test_a_pth_file_loads_like_safetensors(saved: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": image_vit().state_dict()}, tmp_path / "vit.pth")
    one, two = trunk_for(), trunk_for()
    load_image_vit(one, str(saved))
    load_image_vit(two, str(tmp_path / "vit.pth"))
    for (name, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_timm_by_name_with_a_local_file(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    save_file(model.state_dict(), tmp_path / "t.safetensors")
    with torch.device("meta"):
        trunk = Trunk(
            ModelBlock.model_validate(
                {"size": "tiny", "classes": 2, "width": 192, "depth": 12, "heads": 3, "mlp": 768, "patch": 16}
            )
        )
    build(trunk)
    load_image_vit(trunk, f"timm:vit_tiny_patch16_224@{tmp_path / 't.safetensors'}")
    assert torch.equal(trunk.encoder.blocks[3].mlp.fc1.weight, model.blocks[3].mlp.fc1.weight)


def test_another_grid_is_resized_and_cls_kept(saved: Path) -> None:
    trunk = trunk_for(image_size=48)
    load_image_vit(trunk, str(saved))
    source = image_vit().pos_embed
    assert torch.equal(trunk.encoder.pos_embed[0, 0], source[0, 0])
    corners = trunk.encoder.pos_embed[0, 1:].view(6, 6, 48)[::5, ::5]
    torch.testing.assert_close(corners, source[0, 1:].view(4, 4, 48)[::3, ::3])


def test_resize_is_bilinear_on_known_values() -> None:
    grid = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).view(1, 4, 1)
    out = resize_grid_positions(grid, 9, with_cls=False).view(3, 3)
    assert out.tolist() == [[0.0, 0.5, 1.0], [1.0, 1.5, 2.0], [2.0, 2.5, 3.0]]


def test_our_own_stage_is_an_image_checkpoint(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = ViViT(ModelBlock.model_validate({"size": "tiny", "classes": 2, "image_size": 32, **DIMS}), frames=2)
    build(model)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    trunk = trunk_for()
    load_image_vit(trunk, str(tmp_path / "own.safetensors"))
    tubelets = normalise(torch.randint(0, 256, (1, 3, 2, 32, 32)), (0.5,) * 3, (0.5,) * 3, torch.float32)
    assert torch.equal(trunk.forward_tubelets(tubelets), model.trunk.forward_tubelets(tubelets))


@pytest.mark.parametrize("pooling", ["cls", "gap"])
def test_our_own_positions_are_resized_as_timms_are(tmp_path: Path, pooling: str) -> None:
    """A trunk of 4 x 4 patches in one of 6 x 6: corners and the cls entry stay, and it is told."""
    small, large = trunk_for(pooling=pooling), trunk_for(pooling=pooling, image_size=48)
    save_file({f"trunk.{key}": value for key, value in small.state_dict().items()}, tmp_path / "own.safetensors")
    loaded = load_image_vit(large, str(tmp_path / "own.safetensors"))
    assert loaded.text.endswith(f"loaded {len(small.state_dict())} tensors, resized positions 4x4 -> 6x6")
    first = int(pooling == "cls")
    table, given = large.encoder.pos_embed[0], small.encoder.pos_embed[0]
    torch.testing.assert_close(table[first:].view(6, 6, 48)[::5, ::5], given[first:].view(4, 4, 48)[::3, ::3])
    assert torch.equal(table[:first], given[:first])
    assert torch.equal(large.embed.weight, small.embed.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc2.bias"), "1 missing: encoder.blocks.1.mlp.fc2.bias"),
        (
            lambda s: s.update({"blocks.0.attn.q_norm.weight": torch.ones(16)}),
            "1 unexpected: .*attn.q_norm",
        ),
        (lambda s: s.update({"blocks.0.ls1.gamma": torch.ones(47)}), r"blocks.0.ls1.gamma is \(47,\)"),
        (lambda s: s.update({"pos_embed": torch.ones(17, 48)}), r"pos_embed is \(17, 48\), wanted 3 axes"),
        (lambda s: s.update({"patch_embed.proj.weight": torch.ones(48, 192)}), r"proj.weight is \(48, 192\)"),
        (lambda s: s.update({"pos_embed": torch.ones(1, 0, 48)}), "position table of 0 entries"),
        (lambda s: (s.clear(), s.update({"a": torch.ones(3)})), r"30 missing: .*; 1 unexpected: encoder\.a"),
        (lambda s: s.pop("pos_embed"), "1 missing: encoder.pos_embed"),
        (lambda s: s.update({"norm.bias": torch.ones(48, dtype=torch.int8)}), "encoder.norm.bias is torch.int8"),
        (lambda s: s.update({f"decoder.{i}": torch.ones(1) for i in range(99)}), "99 unexpected: .* and 94 more"),
        (lambda s: s.update({"norm.weight": torch.ones(47)}), r"encoder.norm.weight is \(47,\), wanted \(48,\)"),
        (lambda s: s.pop("cls_token"), "set model.pooling: gap"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    state = dict(image_vit().state_dict())
    change(state)
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(RecipeError, match=message):
        load_image_vit(trunk_for(), str(tmp_path / "vit.safetensors"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights file .*absent.safetensors"):
        read_state(tmp_path / "absent.safetensors")
    for name in ("cut.safetensors", "cut.pth"):
        (tmp_path / name).write_bytes(b"\x00" * 7)
        with pytest.raises(CheckpointError, match=name):
            read_state(tmp_path / name)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    torch.save({"x": Boom()}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="not loaded"):
        read_state(tmp_path / "bad.pth")
    assert not Boom.ran


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(2)],
        {1: torch.ones(2)},
        {"model": {"a": 1.0}},
        {},
        torch.ones(2),
        {"pos_embed": torch.tensor([float("nan")])},
        {"pos_embed": torch.ones(2, 2).to_sparse()},
        {"pos_embed": torch.ones(2, device="meta")},
    ],
    ids=["a list", "numbered", "no tensors", "empty", "one tensor", "nan", "sparse", "meta"],
)
def test_a_pth_file_of_another_kind_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"odd\.pth"):
        load_image_vit(trunk_for(), str(tmp_path / "odd.pth"))


@pytest.mark.parametrize("name", ["bad.pth", "bad.bin", "bad"])
def test_timm_does_not_run_a_pickle_either(tmp_path: Path, name: str) -> None:
    torch.save({"x": Boom()}, tmp_path / name)
    with pytest.raises(CheckpointError, match="timm could not load"):
        load_image_vit(trunk_for(), f"timm:vit_tiny_patch16_224@{tmp_path / name}")
    assert not Boom.ran


def test_unknown_timm_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="timm knows no model 'vit_typo'"):
        load_image_vit(trunk_for(), "timm:vit_typo")
    with pytest.raises(CheckpointError, match="no file"):
        load_image_vit(trunk_for(), f"timm:vit_tiny_patch16_224@{tmp_path / 'none.npz'}")


class Boom:
    """Runs code when unpickled."""

    ran = False

    def __reduce__(self) -> Any:
        return (setattr, (Boom, "ran", True))

"""The factorised encoder against the facts: sizes to the parameter, initialisation, shapes, what each piece
computes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from sfa_dist.models.adapter import Adapter
from sfa_dist.models.vit import Attention, Encoder, drop_branch, init_encoder
from sfa_dist.models.vivit import SIZES, Tail, Trunk, TubeletEmbed, ViViT, build, normalise
from sfa_dist.plan.flops import forward_macs
from sfa_dist.recipe.blocks import AdapterBlock, ModelBlock


def tiny(**changes: Any) -> ModelBlock:
    return ModelBlock.model_validate({"size": "tiny", "classes": 5, "temporal_depth": 2, "image_size": 16, **changes})


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def on_meta(size: str, depth: int, frames: int = 32) -> ViViT:
    with torch.device("meta"):
        return ViViT(ModelBlock(size=size, classes=400, temporal_depth=depth), frames)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "block", "image_vit"),
    [
        ("B", 7_087_872, 85_798_656),
        ("L", 12_596_224, 303_301_632),
        ("H", 19_677_440, 630_764_800),
        ("g", 25_250_176, 1_011_202_432),
    ],
)
def test_backbone_sizes(size: str, block: int, image_vit: int) -> None:
    """vivit.md 3.2; a trunk differs from the image ViT by the second frame of its tubelet kernel."""
    model, dims = on_meta(size, 1), SIZES[size]
    assert count(model.trunk.encoder.blocks[0]) == block
    assert count(model.trunk) == image_vit + 3 * dims.patch**2 * dims.width


@pytest.mark.parametrize(
    ("size", "depth", "total"),
    [
        ("B", 4, 115_062_928),
        ("B", 0, 86_696_080),
        ("B", 12, 171_765_904),
        ("L", 4, 354_903_440),
        ("L", 24, 606_827_920),
        ("H", 4, 710_765_200),
        ("g", 4, 1_113_622_800),
        ("g", 20, 1_517_625_616),
    ],
)
def test_total_parameters(size: str, depth: int, total: int) -> None:
    """vivit.md 3.3: 400 classes, 32 frames."""
    assert count(on_meta(size, depth)) == total


@pytest.mark.parametrize(
    ("size", "depth", "frames", "trunk_gmac", "temporal_gmac"),
    [("B", 4, 32, 282.9, 0.48), ("L", 24, 128, 3949.3, 19.8), ("H", 4, 96, 8039.4, 3.88), ("g", 20, 48, 6413.8, 12.7)],
)
def test_flops(size: str, depth: int, frames: int, trunk_gmac: float, temporal_gmac: float) -> None:
    """vivit.md 3.4."""
    model = ModelBlock(size=size, classes=400, temporal_depth=depth)  # type: ignore[arg-type]
    macs = forward_macs(model, frames)
    assert macs.trunk / 1e9 == pytest.approx(trunk_gmac, abs=0.06)
    assert macs.temporal / 1e9 == pytest.approx(temporal_gmac, rel=0.02)


def test_tubelet_embedding_is_the_convolution() -> None:
    embed = TubeletEmbed(width=7, tubelet=2, patch=4)
    nn.init.normal_(embed.weight)
    nn.init.normal_(embed.bias)
    x = torch.randn(3, 3, 2, 8, 12)
    expected = F.conv3d(x, embed.weight, embed.bias, stride=(2, 4, 4)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(x), expected, atol=1e-4, rtol=1e-4)


def test_attention_is_softmax_attention() -> None:
    attention = Attention(12, 3)
    x = torch.randn(2, 5, 12)
    q, k, v = (part.view(2, 5, 3, 4).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1))
    weights = (q @ k.transpose(-1, -2) / 2.0).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(2, 5, 12))
    torch.testing.assert_close(attention(x), expected)


def test_every_weight_is_initialised_and_the_head_is_zero() -> None:
    with torch.device("meta"):
        model = ViViT(tiny(), frames=8, adapter=AdapterBlock())
    build(model)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
    assert not model.tail.head.weight.any()
    assert not model.trunk.encoder.cls_token.any()
    assert model.trunk.encoder.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    bound = (6 / (2 * 96)) ** 0.5  # xavier of each D -> D matrix, not of the fused D -> 3D one
    largest = model.trunk.encoder.blocks[0].attn.qkv.weight.abs().max()
    assert bound * 0.98 < largest <= bound


def test_clips_are_encoded_frame_by_frame() -> None:
    """The trunk sees one tubelet at a time; the temporal encoder puts them together."""
    model = build_tiny()
    clips = torch.randint(0, 256, (2, 3, 8, 16, 16), dtype=torch.uint8)
    tubelets = model.trunk.cut_tubelets(clips)
    assert tubelets.shape == (8, 3, 2, 16, 16)
    assert torch.equal(tubelets[5], clips[1, :, 2:4])
    features = model.trunk.forward_tubelets(normalise(tubelets, (0.5,) * 3, (0.5,) * 3, torch.float32))
    alone = model.trunk.forward_tubelets(normalise(tubelets[5:6], (0.5,) * 3, (0.5,) * 3, torch.float32))
    torch.testing.assert_close(features[5:6], alone)
    logits = model.tail(features.unflatten(0, (2, 4)))
    torch.testing.assert_close(logits, model(clips))
    assert logits.dtype == torch.float32


def build_tiny(**changes: Any) -> ViViT:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = ViViT(tiny(**changes), frames=8)
    build(model)
    nn.init.normal_(model.tail.head.weight)
    return model


def test_normalise_is_exact_on_known_pixels() -> None:
    pixels = torch.tensor([0, 127, 255], dtype=torch.uint8).view(1, 3, 1, 1, 1)
    out = normalise(pixels, (0.5, 0.4, 0.3), (0.5, 0.2, 0.1), torch.float32).flatten()
    torch.testing.assert_close(out, torch.tensor([-1.0, (127 / 255 - 0.4) / 0.2, 7.0]))


def test_the_recipe_scales_the_spatial_positions_and_no_others() -> None:
    """All other weights are the same: one draw, scaled."""
    given, scaled = (dict(build_tiny(**keys).state_dict()) for keys in ({}, {"position_std": 0.5}))
    table = "trunk.encoder.pos_embed"
    torch.testing.assert_close(scaled.pop(table), given.pop(table) * 25)
    assert all(torch.equal(scaled[key], value) for key, value in given.items())
    assert given["tail.temporal.pos_embed"].std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("tubelet", [2, 4])
def test_half_of_the_filters_start_as_differences_of_two_frames(tubelet: int) -> None:
    """They see nothing of a still tubelet, and answer noise as loudly as the others, which are as without the key."""
    given, plain = (build_tiny(tubelet=tubelet, tubelet_init=kind).state_dict() for kind in ("difference", "random"))
    name = "trunk.embed.weight"
    kernel, other = given.pop(name), plain.pop(name)
    assert all(torch.equal(given[key], value) for key, value in plain.items())
    assert torch.equal(kernel[48:], other[48:])
    first, second = tubelet // 2 - 1, tubelet // 2
    assert torch.equal(kernel[:48, :, first], -kernel[:48, :, second])
    assert not kernel[:48].sum(2).any()
    assert kernel[:48].count_nonzero() == 2 * kernel[:48, :, second].numel()
    loud = kernel.flatten(1).square().sum(1)
    assert loud[:48].mean().item() == pytest.approx(loud[48:].mean().item(), rel=0.05)


@pytest.mark.parametrize("pooling", ["cls", "gap"])
def test_sincos_positions_are_fixed_and_those_of_mae(pooling: str) -> None:
    """Against the formula, entry by entry; no weights file holds them, and none has a gradient."""
    model = build_tiny(positions="sincos", pooling=pooling)
    encoder, side, width = model.trunk.encoder, 2, 96
    assert model.trunk.tokens == side * side + (pooling == "cls")
    assert not any(name.startswith("trunk.encoder.pos_embed") for name in model.state_dict())
    assert "trunk.encoder.pos_embed" not in dict(model.named_parameters())
    table = encoder.pos_embed[0]
    if pooling == "cls":
        assert not table[0].any()
        table = table[1:]
    for token, found in enumerate(table):
        row, column = divmod(token, side)
        wanted = [
            function(place / 10_000 ** (4 * k / width))
            for place in (column, row)
            for function in (math.sin, math.cos)
            for k in range(width // 4)
        ]
        torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-6, rtol=0)
    assert "tail.temporal.pos_embed" in model.state_dict()


def test_sincos_positions_need_quarters_of_the_width() -> None:
    with pytest.raises(ValueError, match="multiple of 4, not 30"):
        Encoder(30, 1, 3, 24, tokens=4, positions="sincos")
    with pytest.raises(ValidationError, match="leave it out with positions: sincos"):
        tiny(positions="sincos", position_std=0.5)


def test_time_order_matters_only_with_a_temporal_encoder() -> None:
    clips = torch.randint(0, 256, (1, 3, 8, 16, 16), dtype=torch.uint8)
    backwards = clips.unflatten(2, (4, 2)).flip(2).flatten(2, 3)
    with_time, without = build_tiny(), build_tiny(temporal_depth=0)
    assert not torch.allclose(with_time(clips), with_time(backwards), atol=1e-3)
    torch.testing.assert_close(without(clips), without(backwards))


@pytest.mark.parametrize("pooling", ["cls", "gap"])
def test_pooling(pooling: str) -> None:
    encoder = Encoder(12, 1, 3, 24, tokens=5, pooling=pooling)  # type: ignore[arg-type]
    init_encoder(encoder)
    tokens = encoder(torch.randn(2, 5, 12))
    assert tokens.shape == (2, 6 if pooling == "cls" else 5, 12)
    expected = tokens[:, 0] if pooling == "cls" else tokens.mean(1)
    assert torch.equal(encoder.pool(tokens), expected)


def test_dropped_branches_are_whole_clips_without_rescale() -> None:
    torch.manual_seed(0)
    kept = drop_branch(torch.ones(200 * 4, 3, 2), rate=0.3, per_clip=4).view(200, -1)
    assert ((kept == 0).all(1) | (kept == 1).all(1)).all()
    assert 0.2 < (kept[:, 0] == 0).float().mean() < 0.4


def test_drop_path_grows_with_depth_and_is_off_in_evaluation() -> None:
    model = build_tiny(drop_path=0.9)
    rates = [block.drop_path for block in model.trunk.encoder.blocks]
    assert rates == pytest.approx([0.0, 0.3, 0.6, 0.9])
    clips = torch.randint(0, 256, (2, 3, 8, 16, 16), dtype=torch.uint8)
    model.eval()
    assert torch.equal(model(clips), model(clips))
    model.train()
    assert not torch.equal(model(clips), model(clips))


@pytest.mark.parametrize("pooling", ["cls", "gap"])
@pytest.mark.parametrize("placement", ["pooled", "tokens"])
def test_adapter_starts_as_the_identity(placement: str, pooling: str) -> None:
    adapter = Adapter(12, 0.5, True, placement, pooling)  # type: ignore[arg-type]
    adapter.init_weights()
    tokens = torch.randn(2, 3, 5, 12)
    pooled = tokens[..., 0, :] if pooling == "cls" else tokens.mean(-2)
    torch.testing.assert_close(adapter(tokens if placement == "tokens" else pooled), pooled)
    assert adapter.fc1.weight.shape == (6, 12)


def test_token_adapter_sees_more_than_the_cls_token() -> None:
    adapter = Adapter(12, 2.0, True, "tokens", "cls")
    adapter.init_weights()
    nn.init.normal_(adapter.fc2.weight)
    tokens = torch.randn(1, 1, 5, 12)
    changed = tokens.clone()
    changed[..., 3, :] += 1
    assert not torch.allclose(adapter(tokens), adapter(changed))


def test_adapter_without_residual_lets_the_signal_through() -> None:
    adapter = Adapter(12, 1.0, False, "pooled", "cls")
    adapter.init_weights()
    assert adapter(torch.randn(2, 3, 12)).abs().sum() > 0


def test_impossible_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of the patch"):
        Trunk(tiny(image_size=18))
    with pytest.raises(ValueError, match="multiple of heads"):
        Tail(tiny(heads=5), frames=8)

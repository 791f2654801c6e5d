"""`model.pooling: attention`: timm's and big_vision's pool, in training, frozen, and in both encoders."""

from __future__ import annotations

import pytest
import torch
from timm.layers import AttentionPoolLatent
from torch import nn

from sfa_dist.models.frozen import FrozenTrunk
from sfa_dist.models.vit import AttentionPool
from sfa_dist.models.vivit import Tail, ViViT, build, normalise
from sfa_dist.models.weights import load_stage1_into_tail
from sfa_dist.parallel.engines.offload import HostLink
from sfa_dist.recipe.blocks import AdapterBlock, ModelBlock

BLOCK = ModelBlock(size="tiny", classes=5, temporal_depth=1, depth=2, image_size=16, pooling="attention")


def stage1(frames: int = 8) -> ViViT:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = ViViT(BLOCK, frames)
    build(model)
    nn.init.normal_(model.tail.head.weight)
    return model.eval()


def clips(frames: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, frames, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_it_is_timms_with_its_names() -> None:
    torch.manual_seed(2)
    theirs = AttentionPoolLatent(24, num_heads=3, mlp_ratio=2.0, norm_layer=nn.LayerNorm)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = AttentionPool(24, 3, 48, "erf", 1e-5)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randn(5, 7, 24)
    torch.testing.assert_close(ours(tokens), theirs(tokens), atol=1e-5, rtol=1e-5)


def test_both_encoders_have_one_and_it_starts_as_big_visions() -> None:
    model = stage1()
    for encoder in (model.trunk.encoder, model.tail.temporal):
        [pool] = encoder.attn_pool
        assert not hasattr(encoder, "cls_token")
        assert sum(p.numel() for p in pool.parameters()) == sum(p.numel() for p in encoder.blocks[0].parameters()) - 96
        bounds = {"latent": (6 / 97) ** 0.5, "q.weight": (6 / 192) ** 0.5, "kv.weight": (6 / 192) ** 0.5}
        for name, bound in bounds.items():
            assert 0.93 * bound < pool.state_dict()[name].abs().max() <= bound
        assert not any(layer.bias.any() for layer in (pool.q, pool.kv, pool.proj, pool.norm))


def test_every_token_and_every_weight_counts() -> None:
    model = stage1().train()
    tubelets = normalise(model.trunk.cut_tubelets(clips()), (0.5,) * 3, (0.5,) * 3, torch.float32)
    tokens = model.trunk.forward_tubelets(tubelets, pooled=False).detach().requires_grad_()
    model.trunk.encoder.pool(tokens).square().sum().backward()
    assert tokens.grad is not None
    assert (tokens.grad.flatten(2).abs().sum(2) > 0).all()
    model(clips()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("offload", [False, True])
def test_stage2_starts_at_stage1s_function(offload: bool) -> None:
    """In chunks that cut clips; fp32 to 1e-5, bf16 as near as its rounding."""
    model = stage1()
    with torch.device("meta"):
        tail = Tail(BLOCK, 8, AdapterBlock())
    build(tail)
    load_stage1_into_tail(tail, model.state_dict(), keep_head=True, source="test")
    expected = model(clips())
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        frozen = FrozenTrunk(model.trunk, 6, dtype=dtype)
        frozen.link = HostLink(torch.device("cpu")) if offload else None
        features = frozen(clips())
        assert isinstance(features, torch.Tensor)
        assert (features.shape, features.dtype) == ((2, 4, 96), dtype)
        torch.testing.assert_close(tail(features), expected, atol=near * expected.abs().max().item(), rtol=0)

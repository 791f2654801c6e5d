"""The frozen trunk: the same numbers as the plain one, and nothing that training could change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sfa_dist.models.frozen import FrozenTrunk, module_sha256
from sfa_dist.models.vivit import Tail, Trunk, ViViT, build
from sfa_dist.models.weights import load_stage1_into_tail, resize_time_positions
from sfa_dist.recipe.blocks import AdapterBlock, ModelBlock

MODEL = ModelBlock(size="tiny", classes=5, temporal_depth=2, image_size=16)


def stage1(frames: int = 8, model_block: ModelBlock = MODEL) -> ViViT:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = ViViT(model_block, frames)
    build(model)
    nn.init.normal_(model.tail.head.weight)
    return model.eval()


def clips(frames: int = 8, batch: int = 2) -> torch.Tensor:
    return torch.randint(
        0, 256, (batch, 3, frames, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def tail_of(model: ViViT, frames: int, adapter: AdapterBlock | None = None, model_block: ModelBlock = MODEL) -> Tail:
    with torch.device("meta"):
        tail = Tail(model_block, frames, adapter)
    build(tail)
    load_stage1_into_tail(tail, model.state_dict(), keep_head=True, source="test")
    return tail


@pytest.mark.parametrize("adapter", [AdapterBlock(), AdapterBlock(placement="tokens"), AdapterBlock(hidden=2.0), None])
def test_stage2_starts_at_stage1s_function(adapter: AdapterBlock | None) -> None:
    """Invariant 2: fp32, 8 frames; 1e-6 where pixels are normalised as in stage 1, 1e-5 where that is folded in."""
    model = stage1()
    tail = tail_of(model, 8, adapter)
    with torch.no_grad():
        expected = model(clips())
        for fold, tolerance in ((False, 1e-6), (True, 1e-5)):
            frozen = FrozenTrunk(model.trunk, 16, not tail.takes_tokens, dtype=torch.float32, fold=fold)
            scale = expected.abs().max().item()
            torch.testing.assert_close(tail(frozen(clips())), expected, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize(
    "keys",
    [{"subtract": "mean"}, {"subtract": "median"}, {"centre": True, "position_std": 0.5}, {"positions": "sincos"}],
)
def test_stage2_starts_at_stage1s_function_of_what_moves(keys: dict[str, Any]) -> None:
    """Invariant 2, in chunks that cut clips; and it is another function than without the key."""
    block = MODEL.model_copy(update=keys)
    model, plain = stage1(model_block=block), stage1()
    plain.load_state_dict(model.state_dict(), strict=False)  # Fixed positions are not part of it.
    tail = tail_of(model, 8, AdapterBlock(), block)
    with torch.no_grad():
        expected = model(clips())
        scale = expected.abs().max().item()
        got = tail(FrozenTrunk(model.trunk, 6, dtype=torch.float32)(clips()))
        torch.testing.assert_close(got, expected, atol=1e-5 * scale, rtol=0)
        assert (plain(clips()) - expected).abs().max() > 0.01 * scale


@pytest.mark.parametrize("chunk", [2, 6, 8, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_equals_unchunked(chunk: int, dtype: torch.dtype) -> None:
    trunk = stage1().trunk
    whole = FrozenTrunk(trunk, 1000, dtype=dtype)(clips(16))
    parts = FrozenTrunk(trunk, chunk, dtype=dtype)(clips(16))
    torch.testing.assert_close(parts.float(), whole.float(), atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)
    assert parts.shape == (2, 8, 96)


@pytest.mark.fault(65)
def test_features_train_the_tail_and_leave_the_trunk_alone() -> None:
    """Invariant 1, on one process."""
    model = stage1()
    tail = tail_of(model, 8, AdapterBlock())
    frozen = FrozenTrunk(model.trunk, 4)
    before = frozen.sha256()
    frozen.train()
    optimizer = torch.optim.SGD(tail.parameters(), lr=0.1)
    for _ in range(2):
        features = frozen(clips())
        assert not features.is_inference()
        assert not features.requires_grad
        tail(features).square().mean().backward()
        optimizer.step()
    assert not any(module.training for module in frozen.modules())
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert frozen.sha256() == before
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}


@pytest.mark.fault(65)
def test_hash_sees_names_and_bits() -> None:
    trunk = stage1().trunk
    before = module_sha256(trunk)
    with torch.no_grad():
        trunk.encoder.norm.bias[0] += 1e-6
    assert module_sha256(trunk) != before


def test_time_positions_are_interpolated_linearly_and_cls_is_kept() -> None:
    table = torch.arange(5.0).view(1, 5, 1)
    longer = resize_time_positions(table, 7, with_cls=True)
    assert longer.flatten().tolist() == pytest.approx(
        [0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0][:1] + [1 + i / 2 for i in range(7)]
    )
    assert torch.equal(resize_time_positions(table, 4, with_cls=True), table)


def test_a_longer_tail_takes_stage1s_weights() -> None:
    model = stage1()
    tail = tail_of(model, 24, AdapterBlock())
    trunk: Trunk = model.trunk
    out = tail(FrozenTrunk(trunk, 8)(clips(24)))
    assert out.shape == (2, 5)
    assert torch.isfinite(out).all()
    assert torch.equal(tail.head.weight, model.tail.head.weight)


@pytest.mark.parametrize(("trained", "wanted"), [(3, 1), (1, 3), (2, 0), (0, 2)])
def test_a_temporal_encoder_of_another_depth_takes_the_first_blocks(trained: int, wanted: int) -> None:
    torch.manual_seed(0)
    stage1 = build(ViViT(MODEL.model_copy(update={"temporal_depth": trained}), 4)).state_dict()
    tail = build(Tail(MODEL.model_copy(update={"temporal_depth": wanted}), 8))
    before = {key: value.clone() for key, value in tail.state_dict().items()}
    load_stage1_into_tail(tail, stage1, keep_head=True, source="test")
    for key, value in tail.state_dict().items():
        if key == "temporal.pos_embed":
            continue
        source = stage1.get(f"tail.{key}")
        assert torch.equal(value, before[key] if source is None else source), key
    taken = [key for key in tail.state_dict() if key.startswith("temporal.blocks.") and f"tail.{key}" in stage1]
    assert len({key.split(".")[2] for key in taken}) == min(trained, wanted)

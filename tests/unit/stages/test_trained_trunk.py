"""A stage 2 that trains its trunk starts as the function that a frozen trunk and the tail are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sfa_dist.recipe.schema import Stage1, Stage2
from sfa_dist.stages.assemble import assemble_end_to_end, assemble_stage2, assemble_unfrozen, load_for_test, save_final

COMMON: dict[str, Any] = {
    "model": {"size": "tiny", "width": 24, "depth": 1, "heads": 2, "mlp": 32, "image_size": 16, "temporal_depth": 1}
    | {"classes": 3},
    "data": {},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "schedule": {"epochs": 1},
    "engine": {"precision": "fp32"},
}
CLASSES = '["a", "b", "c"]'


def stage2(**own: Any) -> Stage2:
    return Stage2.model_validate({**COMMON, "frames": 8, **own})


@pytest.fixture
def stage1(tmp_path: Path) -> Path:
    """The weights of a stage 1 none of whose tensors has its first value."""
    stage = Stage1.model_validate({**COMMON, "frames": 4})
    parts = assemble_end_to_end(stage, None)
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in parts.trainable.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    described = {"model": stage.model.model_dump(), "pixels": (stage.data.mean, stage.data.std), "classes": CLASSES}
    save_final(tmp_path / "stage1.safetensors", parts, dict(parts.trainable.named_parameters()), described)
    return tmp_path / "stage1.safetensors"


@pytest.mark.parametrize("placement", ["pooled", "tokens"])
def test_it_starts_as_the_frozen_one(stage1: Path, placement: str) -> None:
    adapter = {"adapter": {"placement": placement}}
    frozen = assemble_stage2(stage2(**adapter), stage1, CLASSES)
    whole = assemble_unfrozen(stage2(**adapter, freeze_trunk=False), stage1, CLASSES)
    assert frozen.frozen is not None
    assert whole.frozen is None
    clips = torch.randint(0, 256, (2, 3, 8, 16, 16), dtype=torch.uint8)
    with torch.inference_mode():
        wanted = frozen.trainable(frozen.frozen(clips))
        found = whole.trainable(clips)
    assert wanted.abs().max() > 0.01
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert sum(whole.parameters()) == sum(frozen.parameters())
    assert all(tensor.requires_grad for tensor in whole.trainable.parameters())


def test_its_weights_hold_the_trunk_and_are_tested_without_stage_1(stage1: Path, tmp_path: Path) -> None:
    stage = stage2(freeze_trunk=False)
    whole = assemble_unfrozen(stage, stage1, CLASSES)
    described = {"model": stage.model.model_dump(), "pixels": (stage.data.mean, stage.data.std), "classes": CLASSES}
    save_final(tmp_path / "stage2.safetensors", whole, dict(whole.trainable.named_parameters()), described)
    again = load_for_test(stage, tmp_path / "stage2.safetensors", None)
    clips = torch.randint(0, 256, (1, 3, 8, 16, 16), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(again.trainable(clips), whole.trainable(clips))

"""A timeline's windows are the clips that they are, also where a step depends on its window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sfa_dist.inference.finished_stage import FinishedStage
from sfa_dist.inference.predictor import Model
from sfa_dist.inference.timeline import Windows, slide
from sfa_dist.models.vivit import ViViT, build
from sfa_dist.recipe.schema import Recipe

MODEL = {"size": "tiny", "classes": 3, "temporal_depth": 1, "image_size": 16, "width": 24, "depth": 1, "mlp": 32}
TRAINING: dict[str, Any] = {"optimizer": {"lr": 0.1}, "schedule": {"epochs": 1}, "engine": {"precision": "fp32"}}


def model_of(folder: Path, **keys: Any) -> Model:
    stage = {"frames": 8, "model": {**MODEL, **keys}, "data": {}, **TRAINING}
    recipe = Recipe.model_validate({"name": "t", "stage1": stage})
    assert recipe.stage1 is not None
    torch.manual_seed(0)
    with torch.device("meta"):
        model = ViViT(recipe.stage1.model, 8)
    build(model)
    nn.init.normal_(model.tail.head.weight)
    save_file(model.state_dict(), folder / "weights.safetensors")
    file = FinishedStage(folder / "recipe.yaml", "stage1", folder / "weights.safetensors", None)
    return Model(recipe, file, torch.device("cpu"))


@pytest.mark.parametrize(
    "keys", [{"centre": True}, {"subtract": "mean"}, {"subtract": "median", "centre": True, "position_std": 0.5}]
)
@pytest.mark.parametrize(("length", "hop"), [(20, 4), (20, 1), (5, 4)])
def test_windows_of_a_timeline_are_clips(tmp_path: Path, keys: dict[str, Any], length: int, hop: int) -> None:
    model = model_of(tmp_path, **keys)
    video = torch.randint(0, 256, (length, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = list(slide(iter(video), Windows(8, 1, 2, hop), model.steps, model.windows, chunk=3))
    assert [scored.start for scored in found] == (list(range(0, length - 7, hop)) if length >= 8 else [0])
    for scored in found:
        clip = video[torch.arange(scored.start, scored.start + 8) % length].transpose(0, 1).unsqueeze(0)
        torch.testing.assert_close(scored.logits, model.logits(clip)[0], atol=2e-5, rtol=0)


def test_only_a_subtraction_makes_a_step_depend_on_its_window(tmp_path: Path) -> None:
    assert model_of(tmp_path, centre=True).shares_steps
    assert not model_of(tmp_path, subtract="mean").shares_steps

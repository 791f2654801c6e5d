"""Every recipe that is shipped describes models that can be built, of the sizes that the papers' formulae give.

All on the meta device: ViViT-g has 1.5 billion parameters and is built here in no memory at all.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sfa_dist.models.vivit import SIZES, Tail, Trunk, ViViT, dims_of
from sfa_dist.models.weights import load_exactly
from sfa_dist.parallel.engines.zero_config import derive_config
from sfa_dist.recipe.schema import STAGE_NAMES, Recipe, StageBlock, load_recipe

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "_base_")
TWO_STAGES = [path for path in RECIPES if not path.stem.endswith("_baseline")]

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
each_of_two_stages = pytest.mark.parametrize("path", TWO_STAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")


def load(path: Path) -> Recipe:
    return load_recipe(path, environ={"SFA_DATA": "/data"}).recipe


def parts(stage: StageBlock) -> tuple[Trunk, Tail]:
    with torch.device("meta"):
        return Trunk(stage.model), Tail(stage.model, stage.frames, getattr(stage, "adapter", None))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def formula(stage: StageBlock) -> tuple[int, int, int, int]:
    """(spatial, temporal, head, adapter) parameters by the sums of the layers; `gap` has no cls tokens."""
    dims = dims_of(stage.model)
    d, m, p, t = dims.width, dims.mlp, dims.patch, stage.model.tubelet
    block = 4 * (d * d + d) + 4 * d + (d * m + m) + (m * d + d)
    cls = int(stage.model.pooling == "cls")
    positions, steps = (stage.model.image_size // p) ** 2 + cls, stage.frames // t + cls
    spatial = (3 * p * p * t * d + d) + cls * d + positions * d + dims.depth * block + 2 * d
    temporal = cls * d + steps * d + stage.model.temporal_depth * block + 2 * d if stage.model.temporal_depth else 0
    head = d * stage.model.classes + stage.model.classes
    adapter = getattr(stage, "adapter", None)
    inner = round(d * adapter.hidden) if adapter else 0
    return spatial, temporal, head, 2 * d * inner + inner + d if adapter else 0


@each_recipe
def test_every_stage_has_as_many_parameters_as_the_formula_says(path: Path) -> None:
    recipe = load(path)
    for name in STAGE_NAMES:
        stage = getattr(recipe, name)
        if stage is not None:
            trunk, tail = parts(stage)
            spatial, temporal, head, adapter = formula(stage)
            assert count(trunk) == spatial
            assert count(tail) == temporal + head + adapter


@each_recipe
def test_stage_1_is_trunk_and_tail_and_nothing_else(path: Path) -> None:
    stage = load(path).stage1
    assert stage is not None
    with torch.device("meta"):
        model = ViViT(stage.model, stage.frames)
    trunk, tail = parts(stage)
    assert {name for name, _ in model.named_parameters()} == {
        *(f"trunk.{name}" for name, _ in trunk.named_parameters()),
        *(f"tail.{name}" for name, _ in tail.named_parameters()),
    }
    assert all(parameter.is_meta for parameter in model.parameters())


@each_of_two_stages
def test_stage_2_freezes_the_trunk_of_stage_1_and_trains_the_rest(path: Path) -> None:
    recipe = load(path)
    assert recipe.stage1 is not None
    assert recipe.stage2 is not None
    trunk1, tail1 = parts(recipe.stage1)
    trunk2, tail2 = parts(recipe.stage2)
    load_exactly(trunk2, trunk1.state_dict(), "stage 1")  # the same names and shapes
    adapter = count(tail2.adapter) if tail2.adapter is not None else 0
    longer = (recipe.stage2.frames - recipe.stage1.frames) // recipe.stage1.model.tubelet
    positions = longer * dims_of(recipe.stage1.model).width if tail2.temporal is not None else 0
    assert count(tail2) == count(tail1) + adapter + positions
    assert count(tail2) < count(trunk2) or recipe.stage2.model.size == "tiny"


@each_recipe
def test_its_batch_divides_over_the_ranks_of_one_machine(path: Path) -> None:
    """No rank is idle, and no slot of the global batch stays empty: on 1, 8 or 64 GPUs, for the demo on two cores."""
    recipe = load(path)
    for whole in filter(None, (getattr(recipe, name) for name in STAGE_NAMES)):
        for world_size in (1, 2) if whole.model.size == "tiny" else (1, 8, 64):
            stage = whole.on_ranks(world_size)
            assert stage.batch.micro == min(whole.batch.micro, stage.batch.size // world_size)
            accumulation = stage.batch.accumulation(world_size)
            assert derive_config(stage, world_size, accumulation)["train_batch_size"] == stage.batch.size


def test_the_largest_is_the_1_5_billion_of_the_paper() -> None:
    """g with a temporal depth of 20 and 400 classes has 1,517.63M on 32 frames."""
    recipe = load(ROOT / "recipes" / "g_48f.yaml")
    assert recipe.stage2 is not None
    assert (recipe.stage2.model.classes, recipe.stage2.model.temporal_depth) == (400, 20)
    stage = recipe.stage2.model_copy(update={"frames": 32})
    trunk, tail = parts(stage)
    image_vit, second_frame_of_the_tubelet = 1_011_202_432, 3 * 14 * 14 * 1408
    blocks, cls_positions_norm, head = 20 * 25_250_176, (1 + 17 + 2) * 1408, 1408 * 400 + 400
    adapter = 2 * 1408 * 704 + 704 + 1408
    assert count(trunk) == image_vit + second_frame_of_the_tubelet == 1_012_030_336
    assert count(tail) == blocks + cls_positions_norm + head + adapter == 505_595_280 + adapter
    assert count(trunk) + count(tail) == 1_517_625_616 + adapter
    assert count(parts(recipe.stage2)[1]) == count(tail) + 8 * 1408  # 48 frames have 8 more positions


@pytest.mark.parametrize(
    ("size", "depth", "millions"),
    [("B", 4, 115.06), ("L", 4, 354.90), ("L", 24, 606.83), ("H", 4, 710.77), ("g", 4, 1113.62), ("g", 20, 1517.63)],
)
def test_sizes_have_the_published_parameter_counts(size: str, depth: int, millions: float) -> None:
    """Kinetics-400's head, 32 frames; B and L are the papers' numbers too."""
    recipe = load_recipe(
        ROOT / "recipes" / "b_32f.yaml", [f"model.size={size}", f"model.temporal_depth={depth}", "stage1.frames=32"]
    ).recipe
    assert recipe.stage1 is not None
    with torch.device("meta"):
        model = ViViT(recipe.stage1.model, 32)
    assert round(count(model) / 1e6, 2) == pytest.approx(millions, abs=0.005)
    assert size in SIZES

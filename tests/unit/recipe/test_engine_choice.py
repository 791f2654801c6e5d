"""engine.* in a recipe: which engine it makes, what contradicts it, how it is called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sfa_dist.errors import RecipeError
from sfa_dist.parallel.engines.make_engine import make_engine
from sfa_dist.parallel.engines.zero_config import derive_config
from sfa_dist.recipe.blocks import EngineBlock
from sfa_dist.recipe.schema import Stage1, load_recipe

ROOT = Path(__file__).resolve().parents[3]


def stage(engine: dict[str, Any]) -> Stage1:
    return Stage1.model_validate(
        {
            "model": {"size": "tiny", "classes": 5},
            "data": {},
            "optimizer": {"lr": 0.1},
            "schedule": {"epochs": 1},
            "engine": engine,
        }
    )


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("choice", ["name=fsdp", "reduction=tree", "cpu_offload=true"])
def test_every_recipe_takes_every_engine(recipe: Path, choice: str) -> None:
    """Their bases set `zero`, which the others do not look at."""
    loaded = load_recipe(recipe, [f"engine.{choice}"]).recipe
    assert loaded.stage2
    key, value = choice.split("=")
    assert str(getattr(loaded.stage2.engine, key)).lower() == value


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["engine.name=fsdp", "deepspeed.wall_clock_breakdown=true"],
            "deepspeed: has no effect: engine.name is fsdp; remove the block",
        ),
        (
            ["engine.reduction=tree", "deepspeed.wall_clock_breakdown=true"],
            "deepspeed: has no effect: engine.reduction is tree; remove the block",
        ),
        (["engine.reduction=tree", "engine.cpu_offload=true"], "goes with engine.reduction: native"),
        (["engine.zero=0", "engine.cpu_offload=true"], "set engine.zero to 1, 2 or 3"),
        (["engine.shard_ranks=8"], "zero_hpz_partition_size"),
        (["engine.name=fsdp", "engine.reduction=tree", "engine.shard_ranks=8"], "which shards nothing"),
        (["engine.reduction=tree", "batch.micro=5"], "5 does not divide 64"),
        (["engine.name=fsdp2"], "expected 'deepspeed' or 'fsdp', got 'fsdp2'"),
    ],
)
def test_contradictions(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(ROOT / "recipes" / "h_96f.yaml", overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("engine", "title"),
    [
        ({}, "ZeRO-2"),
        ({"zero": 3, "cpu_offload": True}, "ZeRO-3, offloaded to the CPU"),
        ({"name": "fsdp", "zero": 1}, "FSDP2"),
        ({"name": "fsdp", "cpu_offload": True}, "FSDP2, offloaded to the CPU"),
        ({"name": "fsdp", "shard_ranks": 8}, "FSDP2 in groups of 8"),
        ({"name": "fsdp", "reduction": "tree"}, "replicated, exact"),
    ],
)
def test_titles(engine: dict[str, Any], title: str) -> None:
    assert EngineBlock.model_validate(engine).title == title


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_one_rank_has_nothing_to_shard(zero: int) -> None:
    written = stage({"zero": zero})
    assert written.on_ranks(1).engine == EngineBlock(zero=0)
    assert written.on_ranks(2).engine == written.engine == EngineBlock(zero=zero)
    assert written.engine.title_of(written.on_ranks(1).engine) == f"ZeRO-{zero}, on one rank as ZeRO-0"
    assert written.engine.title_of(written.on_ranks(2).engine) == f"ZeRO-{zero}"


@pytest.mark.parametrize(
    "needs",
    [
        {"engine": {"cpu_offload": True}},
        {"deepspeed": {"zero_optimization": {"stage": 2}}},
        {"activation": "checkpoint", "activation_backend": "deepspeed"},
        {"activation": "checkpoint_offload", "activation_backend": "fairscale"},
        {"engine": {"name": "fsdp"}},
        {"engine": {"reduction": "tree"}},
        {"engine": {"zero": 0}},
    ],
    ids=str,
)
def test_one_rank_keeps_the_engine_that_something_needs(needs: dict[str, Any]) -> None:
    written = Stage1.model_validate({**stage({}).model_dump(), **needs})
    assert written.on_ranks(1).engine == written.engine


def test_in_fp32_any_activation_backend_goes_with_zero_0() -> None:
    own = {"engine": {"precision": "fp32"}, "activation": "checkpoint", "activation_backend": "deepspeed"}
    running = Stage1.model_validate({**stage({}).model_dump(), **own}).on_ranks(1)
    assert running.engine.zero == 0
    assert Stage1.model_validate(running.model_dump()) == running


def test_deepspeed_is_told_to_offload() -> None:
    config = derive_config(stage({"cpu_offload": True, "zero": 3}), 1, 1)
    assert config["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in derive_config(stage({}), 1, 1)


@pytest.mark.fault(65)
@pytest.mark.parametrize("engine", [{}, {"name": "fsdp"}, {"reduction": "tree"}])
def test_a_frozen_parameter_is_refused(engine: dict[str, Any]) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match=r"frozen \['1.weight', '1.bias'\]"):
        make_engine(module, stage(engine), 1, torch.device("cpu"))


@pytest.mark.parametrize("engine", ['{"name": "fsdp"}', '{"reduction": "tree"}'])
def test_deepspeed_is_imported_by_its_own_engine_alone(engine: str) -> None:
    code = (
        "import sys, torch\n"
        "from sfa_dist.parallel import runtime\n"
        "from sfa_dist.parallel.engines.make_engine import make_engine\n"
        "from sfa_dist.recipe.schema import Stage1\n"
        "blocks = {'model': {'size': 'tiny', 'classes': 5}, 'data': {}, 'optimizer': {'lr': 0.1}}\n"
        f"stage = Stage1.model_validate(blocks | {{'schedule': {{'epochs': 1}}, 'engine': {engine}}})\n"
        "make_engine(torch.nn.Linear(2, 2), stage, 64, runtime.start({}).device)\n"
        "assert 'deepspeed' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

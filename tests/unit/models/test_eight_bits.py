"""A trunk in eight bits beside the same trunk in bf16: how near, how large, and never taken for one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trunk_samples import CPU, clips, trunk_of

from sfa_dist.errors import RecipeError
from sfa_dist.models.eight_bits import EightBits, Int8Linear
from sfa_dist.models.footprint import feature_bytes, trunk_dtype
from sfa_dist.models.frozen import FrozenTrunk
from sfa_dist.plan.memory import predict
from sfa_dist.recipe.blocks import ModelBlock
from sfa_dist.recipe.schema import Stage2
from sfa_dist.stages.feature_cache import _arithmetic
from sfa_dist.stages.trunk_setup import require_units

MODEL = ModelBlock(size="tiny", classes=5, temporal_depth=2, image_size=32)
KINDS: list[EightBits] = ["int8", "fp8"]


def frozen_of(kind: EightBits | None, model: ModelBlock = MODEL, dtype: torch.dtype = torch.bfloat16) -> FrozenTrunk:
    return FrozenTrunk(trunk_of(model), 8, dtype=dtype, eight_bits=kind)


@pytest.mark.parametrize(("kind", "least"), [("int8", 0.999), ("fp8", 0.985)])
def test_features_are_near_those_of_bf16(kind: EightBits, least: float) -> None:
    given = clips(16, size=32)
    wanted, got = frozen_of(None)(given), frozen_of(kind)(given)
    assert got.dtype == torch.bfloat16
    assert not torch.equal(got, wanted)
    cosine = F.cosine_similarity(got.float(), wanted.float(), dim=-1)
    print(kind, cosine.min(), cosine.mean())
    assert cosine.min() > least


@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_half_the_memory_and_counts_the_same_parameters(kind: EightBits) -> None:
    def size(frozen: FrozenTrunk) -> int:
        return sum(t.nbytes for t in frozen.trunk.encoder.blocks.state_dict().values())

    plain, rounded = frozen_of(None), frozen_of(kind)
    assert 0.5 < size(rounded) / size(plain) < 0.53
    assert [p.numel() for p in rounded.parameters()] == [p.numel() for p in plain.parameters()]
    assert not any(p.requires_grad for p in rounded.parameters())


def test_each_has_a_hash_of_its_own() -> None:
    hashes = {frozen_of(kind).sha256() for kind in (None, *KINDS)}
    assert len(hashes) == 3
    assert frozen_of("int8").sha256() == frozen_of("int8").sha256()


def test_the_scale_multiplies_what_it_divided() -> None:
    """The weights that the layer stands for are within half a step of the given ones, channel by channel."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32).bfloat16()
    with torch.no_grad():
        linear.weight[3] = 0.0
        linear.weight[5] *= 100.0
    layer = Int8Linear(linear)
    stands_for = layer.weight.double() * layer.scale.double().unsqueeze(1)
    error = (stands_for - linear.weight.double()).abs().amax(dim=1)
    # A scale that bf16 rounds down leaves the largest weight up to 2**-9 of 127 steps outside of the range.
    assert (error <= 0.76 * layer.scale.double()).all()
    assert (stands_for[3] == 0).all()
    assert layer(torch.randn(2, 7, 64).bfloat16()).shape == (2, 7, 32)


def test_fp8_names_a_width_that_it_cannot_take() -> None:
    odd = MODEL.model_copy(update={"width": 24, "heads": 3})
    with pytest.raises(RecipeError, match="multiples of 16, but the model has a linear layer from 24 to 72"):
        frozen_of("fp8", odd)


# ------------------------------------------------------------------------------------------------ the stage's key


def stage(**keys: Any) -> Stage2:
    model = {"size": "tiny", "classes": 5, "image_size": 32, "temporal_depth": 2}
    plain = {"frames": 8, "model": model, "data": {"train": ["x"]}, "optimizer": {"lr": 0.1}, "schedule": {"epochs": 1}}
    return Stage2.model_validate({**plain, **keys})


def test_dtypes_of_the_key() -> None:
    fp32 = {"engine": {"precision": "fp32"}}
    assert trunk_dtype(stage()) == torch.bfloat16
    assert trunk_dtype(stage(**fp32)) == torch.float32
    assert trunk_dtype(stage(**fp32, trunk_precision="bf16")) == torch.bfloat16
    assert trunk_dtype(stage(**fp32, trunk_precision="int8")) == torch.bfloat16
    assert feature_bytes(stage(**fp32)) == 2 * feature_bytes(stage(**fp32, trunk_precision="int8"))


def test_a_cache_tells_what_its_trunk_was() -> None:
    told = {_arithmetic(stage(trunk_precision=kind)) for kind in ("auto", "bf16", "int8", "fp8")}
    assert told == {"bfloat16", "bfloat16, linear layers in int8", "bfloat16, linear layers in fp8"}


def test_the_plan_counts_half_of_the_frozen_weights() -> None:
    frozen = {kind: predict(stage(trunk_precision=kind)).by_category["frozen"] for kind in ("bf16", "int8", "fp8")}
    assert frozen["int8"] < 0.6 * frozen["bf16"]
    assert frozen["fp8"] < 0.6 * frozen["bf16"]


def test_fp8_without_units_for_it_is_refused() -> None:
    require_units(stage(trunk_precision="int8"), CPU)
    with pytest.raises(RecipeError, match=r"stage2\.trunk_precision: fp8 needs a card .* and this is a CPU: use int8"):
        require_units(stage(trunk_precision="fp8"), CPU)

"""The DeepSpeed config: made from the recipe, native keys passed through, a second source of truth refused."""

from __future__ import annotations

from typing import Any

import pytest

from sfa_dist.errors import RecipeError
from sfa_dist.parallel.engines.zero_config import check_known_keys, derive_config
from sfa_dist.recipe.schema import Stage1


def stage(zero: int = 2, precision: str = "bf16", deepspeed: dict[str, Any] | None = None) -> Stage1:
    return Stage1.model_validate(
        {
            "frames": 8,
            "model": {"size": "tiny", "classes": 5},
            "data": {},
            "batch": {"size": 64, "micro": 2},
            "optimizer": {"lr": 0.1, "clip_norm": 0.7},
            "schedule": {"epochs": 1},
            "engine": {"zero": zero, "precision": precision},
            "deepspeed": deepspeed or {},
        }
    )


def derive(world_size: int = 4, accumulation: int = 8, **options: Any) -> dict[str, Any]:
    return derive_config(stage(**options), world_size, accumulation)


def refusal(native: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        check(derive(deepspeed=native))
    assert caught.value.exit_code == 78
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check(config: dict[str, Any]) -> None:
    """With DeepSpeed's own parser, in a world of one (it asks torch.distributed, which is not started here)."""
    import deepspeed

    known = dict(config)
    known["train_batch_size"] = known["train_micro_batch_size_per_gpu"] * known["gradient_accumulation_steps"]
    check_known_keys(known, deepspeed.DeepSpeedConfig)


def test_batch_clipping_and_stage_are_the_recipes() -> None:
    config = derive()
    assert config["train_batch_size"] == 2 * 8 * 4
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 8
    assert config["gradient_clipping"] == 0.7
    assert config["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("zero", "precision", "bf16", "autocast"),
    [(0, "fp32", False, False), (0, "bf16", False, True), (2, "bf16", True, False), (3, "fp32", False, False)],
)
def test_precision(zero: int, precision: str, bf16: bool, autocast: bool) -> None:
    config = derive(zero=zero, precision=precision)
    assert config["bf16"]["enabled"] is bf16
    assert config["torch_autocast"]["enabled"] is autocast


def test_many_bf16_gradients_are_added_in_fp32() -> None:
    assert derive()["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in derive(accumulation=1)
    assert "data_types" not in derive(precision="fp32")


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_deepspeed_knows_every_key_of_ours(zero: int, precision: str) -> None:
    check(derive(zero=zero, precision=precision))


def test_native_keys_pass_through_beside_ours() -> None:
    native = {
        "zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 1_000_000},
        "wall_clock_breakdown": True,
        "data_types": {"grad_accum_dtype": "bf16"},
    }
    config = derive(deepspeed=native)
    assert config["zero_optimization"] == {"overlap_comm": False, "reduce_bucket_size": 1_000_000, "stage": 2}
    assert config["wall_clock_breakdown"] is True
    assert config["data_types"] == {"grad_accum_dtype": "bf16"}
    check(config)


def test_saying_the_same_twice_is_no_contradiction() -> None:
    assert derive(deepspeed={"gradient_clipping": 0.7, "zero_optimization": {"stage": 2}}) == derive()


def test_no_timer_waits_for_the_gpu_unless_asked_for() -> None:
    check(derive())
    assert derive()["timers"]["throughput"]["enabled"] is False
    asked = {"timers": {"throughput": {"enabled": True}}}
    assert derive(deepspeed=asked)["timers"] == asked["timers"]


@pytest.mark.parametrize(
    ("native", "key"),
    [
        ({"zero_optimization": {"stage": 3}}, "deepspeed.zero_optimization.stage is 3"),
        ({"gradient_clipping": 1.0}, "deepspeed.gradient_clipping is 1.0"),
        ({"train_batch_size": 32}, "deepspeed.train_batch_size is 32"),
        ({"bf16": {"enabled": False}}, "deepspeed.bf16.enabled is False"),
        ({"bf16": False}, "deepspeed.bf16 is False"),
        ({"zero_optimization": None}, "deepspeed.zero_optimization is None"),
    ],
)
def test_a_contradiction_names_the_key_and_both_values(native: dict[str, Any], key: str) -> None:
    assert key in refusal(native)


@pytest.mark.parametrize(
    ("block", "instead"), [("optimizer", "optimizer"), ("scheduler", "schedule"), ("fp16", "engine.precision")]
)
def test_a_block_that_a_recipe_key_owns_is_refused(block: str, instead: str) -> None:
    message = refusal({block: {"type": "Adam"}})
    assert f"deepspeed.{block}" in message
    assert f"use {instead}" in message


@pytest.mark.fault(58)
def test_an_unknown_key_comes_with_the_nearest_known_one() -> None:
    message = refusal({"wall_clock_breakdwon": True})
    assert "deepspeed.wall_clock_breakdwon" in message
    assert "did you mean 'wall_clock_breakdown'?" in message


def test_an_unknown_key_like_none_is_named_too() -> None:
    assert "deepspeed.qqqqqqqq" in refusal({"qqqqqqqq": 1})


@pytest.mark.fault(58)
@pytest.mark.parametrize(
    "native",
    [{"zero_optimization": {"overlap_com": True}}, {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}],
)
def test_an_unknown_key_deeper_down_is_named(native: dict[str, Any]) -> None:
    message = refusal(native)
    assert "overlap_com" in message or "devise" in message


def test_a_value_of_the_wrong_type_is_refused() -> None:
    assert "overlap_comm" in refusal({"zero_optimization": {"overlap_comm": "perhaps"}})

"""What (engine.name, zero, reduction) means, for every one of them."""

from __future__ import annotations

from typing import Any

import pytest

from sfa_dist.recipe.blocks import EngineBlock

EXACT = (True, False, None, True, False, "replicated, exact")
FSDP2 = (False, True, None, False, True, "FSDP2")
# is_exact, uses_fsdp, zero_stage, replicates, gathers_parameters, title
MEANING: dict[tuple[str, int, str], tuple[Any, ...]] = {
    ("deepspeed", 0, "native"): (False, False, 0, True, False, "ZeRO-0"),
    ("deepspeed", 1, "native"): (False, False, 1, False, False, "ZeRO-1"),
    ("deepspeed", 2, "native"): (False, False, 2, False, False, "ZeRO-2"),
    ("deepspeed", 3, "native"): (False, False, 3, False, True, "ZeRO-3"),
    **{("fsdp", zero, "native"): FSDP2 for zero in range(4)},
    **{(name, zero, "tree"): EXACT for name in ("deepspeed", "fsdp") for zero in range(4)},
}


@pytest.mark.parametrize(("name", "zero", "reduction"), MEANING)
def test_every_engine_answers_what_it_is(name: str, zero: int, reduction: str) -> None:
    engine = EngineBlock.model_validate({"name": name, "zero": zero, "reduction": reduction})
    exact, fsdp, zero_stage, replicates, gathers, title = MEANING[name, zero, reduction]
    assert (engine.is_exact, engine.uses_fsdp, engine.zero_stage) == (exact, fsdp, zero_stage)
    assert (engine.replicates, engine.gathers_parameters, engine.title) == (replicates, gathers, title)
    assert engine.shards_optimizer is not replicates
    assert engine.shards(8) == (1 if replicates else 8)


def test_the_title_names_groups_and_offloading() -> None:
    engine = EngineBlock.model_validate({"name": "fsdp", "shard_ranks": 4, "cpu_offload": True})
    assert engine.title == "FSDP2 in groups of 4, offloaded to the CPU"

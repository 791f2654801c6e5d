"""Compiled blocks under every engine that takes them, beside eager ones: the same losses, norms and weights.

By torch.compile's backend without a code generator: what has to fit together here is tracing, engines and activation
checkpoints. The code that is generated is compared in tests/unit/models/test_compiled_blocks.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ranks import run_ranks
from toy_training import accumulation, make_stage, make_tail, train

from sfa_dist.parallel.engines.make_engine import make_engine
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.recipe.schema import Stage2
from sfa_dist.stages.trunk_setup import prepare_trainable

KEEP = ("keep", "torch")
CASES = [
    *(("zero0", "fp32", *KEEP), ("zero0", "bf16", *KEEP), ("zero2", "bf16", *KEEP)),
    *(("fsdp", "fp32", *KEEP), ("fsdp", "bf16", *KEEP), ("tree", "fp32", *KEEP), ("zero2-offload", "fp32", *KEEP)),
    *(("zero2", "fp32", "checkpoint", "torch"), ("fsdp", "fp32", "checkpoint", "torch")),
    *(("fsdp", "bf16", "checkpoint_offload", "torch"), ("zero2", "fp32", "checkpoint", "deepspeed")),
]
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
STEPS = 2


def steps_of(runtime: Runtime, case: tuple[str, ...], compiled: bool) -> dict[str, Any]:
    engine_name, precision, mode, backend = case
    plain = make_stage(engine_name, precision, "sgd").model_dump()
    stage = Stage2.model_validate({**plain, "compile": compiled, "activation": mode, "activation_backend": backend})
    tail = make_tail(stage)
    words = prepare_trainable(tail, stage)
    assert ("trained blocks compiled" in words) is compiled
    engine = make_engine(tail, stage, accumulation(stage, runtime.world_size), runtime.device)
    return {"losses": train(runtime, engine, stage, range(STEPS)), "weights": engine.full_parameters()}


def every_case(runtime: Runtime) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    with patch("torch.compile", partial(torch.compile, backend="aot_eager")):
        return {case: [steps_of(runtime, case, compiled) for compiled in (False, True)] for case in CASES}


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, ...], list[dict[str, Any]]]:
    return run_ranks(2, every_case)[0]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_it_trains_as_eager(found: dict[tuple[str, ...], list[dict[str, Any]]], case: tuple[str, ...]) -> None:
    eager, compiled = found[case]
    allowed = TOLERANCE[case[1]]
    for mine, theirs in zip(compiled["losses"], eager["losses"], strict=True):
        assert mine == pytest.approx(theirs, rel=allowed)
    for name, weight in eager["weights"].items():
        scale = max(weight.abs().max().item(), 1e-3)
        torch.testing.assert_close(compiled["weights"][name], weight, rtol=0, atol=allowed * scale, msg=name)

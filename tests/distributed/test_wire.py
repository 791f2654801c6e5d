"""Bytes that the engines' collectives move in an optimizer step, counted on real ranks, against the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from toy_training import ENGINES, HYBRID, accumulation, make_stage, make_tail, start, train

from sfa_dist.parallel.runtime import Runtime
from sfa_dist.plan.engine_setting import Setting
from sfa_dist.plan.wire import sent_by_engine
from sfa_dist.recipe.schema import Stage2

CASES = [(name, precision) for name in (*ENGINES, *HYBRID) for precision in ("bf16", "fp32") if name != "tree"]
SMALL = 64  # Bytes: norms, losses, stop requests.


class Counted(TorchDispatchMode):
    """Bytes sent by this rank, each collective as a ring."""

    def __init__(self, world: int, shards: int) -> None:
        super().__init__()
        self.sent, self._world, self._shards = 0.0, world, shards

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            whole = max(map(_bytes, args))
            if whole > SMALL:
                self.sent += whole * self._shares_of(str(func))
        return func(*args, **(kwargs or {}))

    def _shares_of(self, name: str) -> float:
        if "allreduce" in name:  # Of hybrid sharding: between the copies.
            ranks = self._world if self._shards in (1, self._world) else self._world // self._shards
            return 2 * (ranks - 1) / ranks
        assert "allgather" in name or "reduce_scatter" in name, name
        return (self._shards - 1) / self._shards


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def stage_of(name: str, precision: str) -> Stage2:
    stage = make_stage(name, precision, "adamw")
    if name != "zero3":
        return stage
    # By default tensors of less than 100,000 elements, here all, stay whole on each rank.
    return stage.model_copy(update={"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}})


def count_all(runtime: Runtime) -> dict[tuple[str, str], float]:
    """Bytes sent in the second step, whose optimizer state is there and whose order of parameters is known."""
    sent = {}
    for name, precision in CASES:
        stage = stage_of(name, precision)
        engine = start(runtime, stage)
        train(runtime, engine, stage, range(2))
        with Counted(runtime.world_size, engine.owners) as counted:
            train(runtime, engine, stage, range(2, 3))
        sent[name, precision] = counted.sent
    return sent


@pytest.fixture(scope="module", params=[2, 4])
def counted(request: pytest.FixtureRequest) -> tuple[int, dict[tuple[str, str], float]]:
    world: int = request.param
    return world, run_ranks(world, count_all)[0]


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_the_plan_counts_what_is_sent(
    name: str, precision: str, counted: tuple[int, dict[tuple[str, str], float]]
) -> None:
    """Padding of these few thousand parameters to a multiple of the ranks is within 8 %."""
    world, sent = counted
    stage = stage_of(name, precision)
    setting = Setting(stage, world, accumulation(stage, world))
    assert setting.accumulation == {2: 2, 4: 1}[world]
    assert sent[name, precision] == pytest.approx(sent_by_engine(make_tail(stage), setting), rel=0.08)

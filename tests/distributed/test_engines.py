"""Every engine on real ranks: it computes what one plain process computes, and owns what it says."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import train_ranks
from ranks import run_ranks
from tiny_runs import losses, make_workplace, sets
from toy_training import (
    ENGINES,
    OFFLOADED,
    REPLICATED,
    accumulation,
    global_batches,
    make_stage,
    make_tail,
    save,
    start,
    train,
)

from sfa_dist.parallel.engines.engine import Engine
from sfa_dist.parallel.engines.zero import ZeroEngine
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.recipe.schema import Stage2

Case = tuple[str, str, str]
Results = dict[Case, dict[str, Any]]
CASES: list[Case] = [
    (engine, precision, optimizer)
    for engine in ENGINES
    for precision in ("fp32", "bf16")
    for optimizer in ("sgd", "adamw")
] + [(engine, *kind) for engine in OFFLOADED for kind in (("fp32", "sgd"), ("bf16", "adamw"))]
HALF, STEPS = 2, 4


@cache
def reference(optimizer: str) -> list[tuple[float, float]]:
    """The same steps in one plain torch process, fp32."""
    stage = make_stage("zero0", "fp32", optimizer)
    tail = make_tail(stage)
    spared = ("bias", "norm.weight", "norm1.weight", "norm2.weight", "pos_embed", "cls_token")
    decay = [p for name, p in tail.named_parameters() if not name.endswith(spared)]
    rest = [p for name, p in tail.named_parameters() if name.endswith(spared)]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    lr = stage.optimizer.lr
    step: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, lr=lr) if optimizer == "adamw" else torch.optim.SGD(groups, lr=lr, momentum=0.9)
    )
    out = []
    for features, labels in global_batches()[:STEPS]:
        loss = torch.nn.functional.cross_entropy(tail(features), labels)
        step.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(tail.parameters(), stage.optimizer.clip_norm)
        step.step()
        out.append((loss.item(), float(norm)))
    return out


def every_case(runtime: Runtime, root: str) -> Results:
    return {case: one_case(runtime, case, Path(root) / "-".join(case)) for case in CASES}


def one_case(runtime: Runtime, case: Case, root: Path) -> dict[str, Any]:
    """Trains, saves half-way, and trains the second half again from what was saved.

    Behind the save comes a step that is not finite: the second half shows whether it has left something.
    """
    stage = make_stage(*case)
    engine = start(runtime, stage)
    first = train(runtime, engine, stage, range(HALF))
    path = save(runtime, engine, root, HALF)
    scores = engine.evaluate(global_batches()[0][0])
    broken = broken_step(runtime, engine, stage)
    losses = first + train(runtime, engine, stage, range(HALF, STEPS))
    parameters = engine.full_parameters()
    resumed = start(runtime, stage, path, HALF)
    return {
        "losses": losses,
        "broken": broken,
        "scores": scores,
        "bytes": engine.optimizer_bytes(),
        "own": [(f.name, f.start, f.numel, sorted(f.tensors)) for f in engine.fragments()],
        "state_bytes": state_bytes(engine),
        "parameters": parameters,
        "resumed_scores": resumed.evaluate(global_batches()[0][0]),
        "resumed": train(runtime, resumed, stage, range(HALF, STEPS)),
        "resumed_parameters": resumed.full_parameters(),
    }


def broken_step(runtime: Runtime, engine: Engine, stage: Stage2) -> float:
    """A step in which one clip of one rank is not finite; its gradient norm."""
    parts = accumulation(stage, runtime.world_size)
    for part in range(parts):
        features = global_batches()[0][0][: stage.batch.micro].clone()
        if runtime.is_main and part == 0:
            features[0, 0, 0] = float("nan")
        engine.backward(engine.forward(features).sum(), last=part == parts - 1)
    return engine.step(stage.optimizer.lr)


def state_bytes(engine: Any) -> int:
    """Bytes that the optimizer really holds: its parameters (the masters) and their states, with padding."""
    masters = [p for group in engine._optimizer.param_groups for p in group["params"]]
    if isinstance(engine, ZeroEngine):
        masters = engine._masters()
    states = [t for state in engine._optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
    return sum(t.numel() * t.element_size() for t in [*masters, *states])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return run_ranks(2, every_case, str(tmp_path_factory.mktemp("engines")))


@pytest.mark.parametrize("case", CASES, ids="-".join)
class TestEachEngine:
    def test_equals_one_plain_process(self, two_ranks: list[Results], case: Case) -> None:
        tolerance = 1e-5 if case[1] == "fp32" else 4e-2
        for (loss, norm), (expected_loss, expected_norm) in zip(
            two_ranks[0][case]["losses"], reference(case[2]), strict=True
        ):
            assert loss == pytest.approx(expected_loss, rel=tolerance)
            assert norm == pytest.approx(expected_norm, rel=2 * tolerance)

    def test_optimizer_bytes_per_rank(self, two_ranks: list[Results], case: Case) -> None:
        engine, _, optimizer = case
        trainable = sum(p.numel() for p in make_tail(make_stage(*case)).parameters())
        per_parameter = 12 if optimizer == "adamw" else 8
        owned = [rank[case]["bytes"] for rank in two_ranks]
        assert sum(owned) == per_parameter * trainable * (2 if engine in REPLICATED else 1)
        for rank in two_ranks:
            padding = rank[case]["state_bytes"] - rank[case]["bytes"]
            assert 0 <= padding <= per_parameter * 64

    def test_owns_every_trainable_element_once_and_no_trunk(self, two_ranks: list[Results], case: Case) -> None:
        sizes = {name: p.numel() for name, p in make_tail(make_stage(*case)).named_parameters()}
        ranks = two_ranks[:1] if case[0] in REPLICATED else two_ranks
        pieces = sorted(piece[:3] for rank in ranks for piece in rank[case]["own"])
        assert {name for name, _, _ in pieces} == set(sizes)
        for name, size in sizes.items():
            position = 0
            for _, start_, numel in (p for p in pieces if p[0] == name):
                assert start_ == position
                position += numel
            assert position == size

    def test_a_step_that_is_not_finite_is_skipped(self, two_ranks: list[Results], case: Case) -> None:
        """The tests of what follows it show that nothing is changed."""
        assert not any(math.isfinite(rank[case]["broken"]) for rank in two_ranks)

    @pytest.mark.fault(66)
    def test_resumes_bit_for_bit(self, two_ranks: list[Results], case: Case) -> None:
        result = two_ranks[0][case]
        assert torch.equal(result["resumed_scores"], result["scores"])
        assert result["resumed"] == result["losses"][HALF:]
        for name, tensor in result["parameters"].items():
            assert torch.equal(tensor, result["resumed_parameters"][name]), name


def test_a_whole_run_is_the_same_under_each(tmp_path: Path) -> None:
    """From the command line, all stages: the same losses and norms at every step, to what fp32 allows."""
    make_workplace(tmp_path)
    found = {}
    for engine in ("deepspeed", "fsdp"):
        run = tmp_path / engine
        arguments = ("--recipe", "t.yaml", "--run-dir", str(run), *sets(f"engine.name={engine}"))
        for process in train_ranks(2, tmp_path, *arguments):
            done = process.wait()
            assert done.code == 0, done.err
        found[engine] = losses(run)
    assert found["fsdp"].keys() == found["deepspeed"].keys()
    for step, pair in found["deepspeed"].items():
        assert found["fsdp"][step] == pytest.approx(pair, rel=1e-4), step

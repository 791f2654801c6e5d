"""The DeepSpeed engine on real ranks: every ZeRO stage computes what one plain process computes, and owns what it
says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks

from sfa_dist import checkpoint as ckpt
from sfa_dist.metrics import weighted_loss_sum
from sfa_dist.models.vivit import Tail, build
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.parallel.zero import ZeroEngine
from sfa_dist.recipe import Stage2

MODEL = {"size": "tiny", "classes": 5, "temporal_depth": 1, "width": 24, "heads": 3, "mlp": 33, "image_size": 16}
CASES = [
    (zero, precision, optimizer)
    for zero in range(4)
    for precision in ("fp32", "bf16")
    for optimizer in ("sgd", "adamw")
]
STEPS = 4
BATCH = 8


def make_stage(zero: int, precision: str, optimizer: str, micro: int) -> Stage2:
    return Stage2.model_validate(
        {
            "frames": 6,
            "model": MODEL,
            "data": {"train": ["x"]},
            "batch": {"size": BATCH, "micro": micro},
            "optimizer": {"name": optimizer, "lr": 0.05 if optimizer == "sgd" else 0.003, "clip_norm": 0.5},
            "schedule": {"epochs": 1},
            "engine": {"zero": zero, "precision": precision},
        }
    )


def make_tail(stage: Stage2) -> Tail:
    torch.manual_seed(0)
    with torch.device("meta"):
        tail = Tail(stage.model, stage.frames, stage.adapter)
    build(tail)
    torch.nn.init.normal_(tail.head.weight, std=0.3)
    return tail


def global_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(BATCH, 3, 24, generator=generator), torch.randint(0, 5, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]


def train(runtime: Runtime, engine: ZeroEngine, stage: Stage2, steps: range) -> list[tuple[float, float]]:
    """Losses and gradient norms of the global batches, each rank taking its slots."""
    world, micro = runtime.world_size, stage.batch.micro
    accumulation = BATCH // (world * micro)
    out = []
    for step in steps:
        features, labels = global_batches()[step]
        total = torch.zeros(())
        for index in range(accumulation):
            first = index * world * micro + runtime.rank * micro
            own = slice(first, first + micro)
            loss = weighted_loss_sum(engine.forward(features[own]), labels[own], torch.ones(micro), 0.0)
            engine.backward(loss * world * accumulation / BATCH, last=index == accumulation - 1)
            total += loss.detach()
        norm = engine.step(stage.optimizer.lr)
        out.append((runtime.sum(float(total))[0] / BATCH, norm))
    return out


def reference(optimizer: str) -> list[tuple[float, float]]:
    """The same steps in one plain torch process, fp32."""
    stage = make_stage(0, "fp32", optimizer, BATCH)
    tail = make_tail(stage)
    lr = stage.optimizer.lr
    step: torch.optim.Optimizer = (
        torch.optim.AdamW(tail.parameters(), lr=lr, weight_decay=0.0)
        if optimizer == "adamw"
        else torch.optim.SGD(tail.parameters(), lr=lr, momentum=0.9)
    )
    out = []
    for features, labels in global_batches():
        loss = torch.nn.functional.cross_entropy(tail(features), labels)
        step.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(tail.parameters(), stage.optimizer.clip_norm)
        step.step()
        out.append((loss.item(), float(norm)))
    return out


def every_case(runtime: Runtime, root: str) -> dict[Any, Any]:
    from pathlib import Path

    results: dict[Any, Any] = {}
    for case in CASES:
        stage = make_stage(*case, micro=2)
        engine = ZeroEngine(make_tail(stage), stage, BATCH // (runtime.world_size * 2), runtime.device)
        first = train(runtime, engine, stage, range(2))
        path = ckpt.save_checkpoint(Path(root) / "-".join(map(str, case)), 2, engine, {"stage": "t"}, runtime, keep=1)
        rest = train(runtime, engine, stage, range(2, STEPS))
        parameters = {name: tensor.clone() for name, tensor in engine.full_parameters().items()}
        own = [(f.name, f.start, f.numel, sorted(f.tensors)) for f in engine.fragments()]
        results[case] = {
            "losses": first + rest,
            "bytes": engine.optimizer_bytes(),
            "own": own,
            "state_bytes": state_bytes(engine),
            "parameters": parameters,
        }
        again = make_tail(stage)
        ckpt_parameters = ckpt.read_parameters(path)
        for name, parameter in again.named_parameters():
            parameter.data.copy_(ckpt_parameters[name])
        resumed = ZeroEngine(again, stage, BATCH // (runtime.world_size * 2), runtime.device)
        ckpt.load_engine(path, resumed, step=2)
        results[case]["resumed"] = train(runtime, resumed, stage, range(2, STEPS))
        results[case]["resumed_parameters"] = resumed.full_parameters()
    return results


def state_bytes(engine: ZeroEngine) -> int:
    """Bytes that the optimizer really holds: its parameters (the masters) and their states, with padding."""
    masters = engine._masters()
    states = [t for state in engine._optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
    return sum(t.numel() * t.element_size() for t in [*masters, *states])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run_ranks(2, every_case, str(tmp_path_factory.mktemp("zero")))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
class TestEachStage:
    def test_equals_one_plain_process(self, two_ranks: list[dict[Any, Any]], case: tuple[int, str, str]) -> None:
        tolerance = 1e-4 if case[1] == "fp32" else 4e-2
        for (loss, norm), (expected_loss, expected_norm) in zip(
            two_ranks[0][case]["losses"], reference(case[2]), strict=True
        ):
            assert loss == pytest.approx(expected_loss, rel=tolerance)
            assert norm == pytest.approx(expected_norm, rel=2 * tolerance)

    def test_optimizer_bytes_per_rank(self, two_ranks: list[dict[Any, Any]], case: tuple[int, str, str]) -> None:
        zero, _, optimizer = case
        stage = make_stage(*case, micro=2)
        trainable = sum(p.numel() for p in make_tail(stage).parameters())
        per_parameter = 12 if optimizer == "adamw" else 8
        owned = [rank[case]["bytes"] for rank in two_ranks]
        assert sum(owned) == per_parameter * trainable * (2 if zero == 0 else 1)
        for rank in two_ranks:
            padding = rank[case]["state_bytes"] - rank[case]["bytes"]
            assert 0 <= padding <= per_parameter * 64

    def test_owns_every_trainable_element_once_and_no_trunk(
        self, two_ranks: list[dict[Any, Any]], case: tuple[int, str, str]
    ) -> None:
        stage = make_stage(*case, micro=2)
        sizes = {name: p.numel() for name, p in make_tail(stage).named_parameters()}
        ranks = two_ranks[:1] if case[0] == 0 else two_ranks
        pieces = sorted(piece[:3] for rank in ranks for piece in rank[case]["own"])
        assert {name for name, _, _ in pieces} == set(sizes)
        for name, size in sizes.items():
            position = 0
            for _, start, numel in (p for p in pieces if p[0] == name):
                assert start == position
                position += numel
            assert position == size

    def test_resumes_bit_for_bit(self, two_ranks: list[dict[Any, Any]], case: tuple[int, str, str]) -> None:
        result = two_ranks[0][case]
        assert result["resumed"] == result["losses"][2:]
        for name, tensor in result["parameters"].items():
            assert torch.equal(tensor, result["resumed_parameters"][name]), name

"""Tokens that were offloaded train the tail as tokens on the device do, under any engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import train as run_train
from ranks import run_ranks
from tiny_runs import losses, make_workplace, scores, sets
from toy_training import accumulation, make_stage

from sfa_dist.models.loss import weighted_loss_sum
from sfa_dist.parallel.engines.make_engine import make_engine
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.recipe.schema import Stage2
from sfa_dist.stages.assemble import Parts, assemble_stage2
from sfa_dist.stages.trunk_setup import place_trunk, prepare_trainable

CASES = [
    *(("zero0", "fp32"), ("zero1", "fp32"), ("zero2", "bf16"), ("zero3", "fp32"), ("zero3", "bf16")),
    *(("fsdp", "fp32"), ("fsdp", "bf16"), ("tree", "fp32"), ("tree", "bf16"), ("zero2-offload", "fp32")),
]
STEPS = 3


def stage_of(engine: str, precision: str, offload: str) -> Stage2:
    plain = make_stage(engine, precision, "sgd").model_dump()
    plain |= {"offload": offload, "adapter": {"placement": "tokens"}, "frames": 12, "chunk_frames": 4}
    return Stage2.model_validate(plain)


def steps_of(runtime: Runtime, stage: Stage2) -> dict[str, Any]:
    torch.manual_seed(0)
    parts: Parts = assemble_stage2(stage, None, classes="")
    torch.nn.init.normal_(parts.trainable.head.weight, std=0.3)
    torch.nn.init.normal_(parts.trainable.adapter.fc2.weight, std=0.3)
    assert parts.frozen is not None
    place_trunk(parts.frozen, stage, runtime)
    words = prepare_trainable(parts.trainable, stage)
    many = accumulation(stage, runtime.world_size)
    engine = make_engine(parts.trainable, stage, many, runtime.device)
    found = []
    for step in range(STEPS):
        total = 0.0
        for part in range(many):
            number = runtime.rank * many + part
            draw = torch.Generator().manual_seed(100 * step + number)
            clips = torch.randint(0, 256, (2, 3, 12, 16, 16), dtype=torch.uint8, generator=draw)
            labels = torch.randint(0, 5, (2,), generator=draw)
            loss = weighted_loss_sum(engine.forward(parts.frozen(clips)), labels, torch.ones(2), 0.0)
            engine.backward(loss / 2, last=part == many - 1)
            total += loss.item()
        found.append((runtime.sum(total)[0], engine.step(0.05)))
    with torch.no_grad():
        scores = engine.evaluate(parts.frozen(clips))
    return {"losses": found, "scores": scores, "weights": engine.full_parameters(), "words": words}


def every_case(runtime: Runtime) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {
        (*case, offload): steps_of(runtime, stage_of(*case, offload)) for case in CASES for offload in ("on", "off")
    }


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str, str], dict[str, Any]]:
    return run_ranks(2, every_case)[0]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_offloaded_equals_not_offloaded(
    found: dict[tuple[str, str, str], dict[str, Any]], case: tuple[str, str]
) -> None:
    """fp32: 1e-5, from the order in which the chunks' gradients are added. bf16: 2 %."""
    rel = 1e-5 if case[1] == "fp32" else 2e-2
    on, off = found[*case, "on"], found[*case, "off"]
    for (loss, norm), (expected, expected_norm) in zip(on["losses"], off["losses"], strict=True):
        assert loss == pytest.approx(expected, rel=rel)
        assert norm == pytest.approx(expected_norm, rel=2 * rel)
    for name, weight in off["weights"].items():
        torch.testing.assert_close(on["weights"][name], weight, rtol=0, atol=rel * max(1.0, weight.abs().max().item()))
    torch.testing.assert_close(on["scores"].float(), off["scores"].float(), rtol=rel, atol=10 * rel)


def test_the_log_says_how_backward_gets_at_the_tokens(found: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    for engine, precision in CASES:
        [words] = found[engine, precision, "on"]["words"]
        assert ("by checkpoint" in words) == engine.startswith(("zero3", "fsdp"))
        assert found[engine, precision, "off"]["words"] == []


def test_a_whole_run_with_it(tmp_path: Path) -> None:
    """From the command line, test included: tokens offloaded, pooled vectors offloaded, chunks by free memory."""
    make_workplace(tmp_path)
    variants = {
        "tokens": ("stage2.adapter.placement=tokens", "stage2.offload=off"),
        "tokens on": ("stage2.adapter.placement=tokens", "stage2.offload=on"),
        "pooled": ("stage2.offload=off",),
        "pooled on": ("stage2.offload=on", "stage2.chunk_frames=auto"),
    }
    for name, keys in variants.items():
        done = run_train(tmp_path, "--recipe", "t.yaml", "--run-dir", str(tmp_path / name), *sets(*keys))
        assert done.code == 0, done.err
    for name in ("tokens", "pooled"):
        plain, other = losses(tmp_path / name), losses(tmp_path / f"{name} on")
        for key, pair in plain.items():
            assert other[key] == pytest.approx(pair, rel=1e-4), key
        for mine, theirs in zip(scores(tmp_path / name), scores(tmp_path / f"{name} on"), strict=True):
            assert theirs[:4] == mine[:4]
    console = (tmp_path / "pooled on" / "console.log").read_text()
    assert "trunk: chunks of 512 frames (auto); offload on" in console

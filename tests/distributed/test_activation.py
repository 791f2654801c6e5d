"""What becomes of activations between forward and backward changes no bit of a step, under any engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import train as run_train
from ranks import run_ranks
from tiny_runs import losses, make_workplace, sets
from toy_training import accumulation, global_batches, make_stage, make_tail, train

from sfa_dist.parallel.engines.make_engine import make_engine
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.recipe.schema import Stage2
from sfa_dist.stages.trunk_setup import prepare_trainable

KEEP = ("keep", "torch")
WAYS = [
    ("checkpoint", "torch"),
    ("offload", "torch"),
    ("checkpoint_offload", "torch"),
    ("checkpoint", "fairscale"),
    ("checkpoint_offload", "fairscale"),
    ("checkpoint", "deepspeed"),
    ("checkpoint_offload", "deepspeed"),
]
EVERY_WAY = [("zero2", "bf16"), ("zero3", "bf16"), ("fsdp", "bf16")]
OFFLOADING_WAYS = [("zero0", "fp32"), ("zero3", "fp32"), ("tree", "fp32")]
CASES = [(*engine, *way) for engine in EVERY_WAY for way in WAYS]
CASES += [(*engine, *way) for engine in OFFLOADING_WAYS for way in WAYS if way[0] == "checkpoint_offload"]
STEPS = 2


def stage_of(engine: str, precision: str, mode: str, backend: str, drop_path: float = 0.5) -> Stage2:
    plain = make_stage(engine, precision, "sgd").model_dump()
    plain |= {"activation": mode, "activation_backend": backend}
    plain["model"]["drop_path"] = drop_path
    return Stage2.model_validate(plain)


def steps_of(runtime: Runtime, stage: Stage2) -> dict[str, Any]:
    tail = make_tail(stage)
    prepare_trainable(tail, stage)
    engine = make_engine(tail, stage, accumulation(stage, runtime.world_size), runtime.device)
    torch.manual_seed(3 + runtime.rank)
    found = train(runtime, engine, stage, range(STEPS))
    return {"losses": found, "weights": engine.full_parameters(), "scores": engine.evaluate(global_batches()[0][0])}


def every_case(runtime: Runtime) -> dict[tuple[str, ...], dict[str, Any]]:
    out = {}
    for engine, precision in dict.fromkeys(case[:2] for case in CASES):
        for case in [(engine, precision, *KEEP), *(case for case in CASES if case[:2] == (engine, precision))]:
            out[case] = steps_of(runtime, stage_of(*case))
    out["no drop",] = steps_of(runtime, stage_of("zero0", "fp32", *KEEP, drop_path=0.0))
    return out


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, ...], dict[str, Any]]:
    return run_ranks(2, every_case)[0]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_changes_no_bit(found: dict[tuple[str, ...], dict[str, Any]], case: tuple[str, ...]) -> None:
    mine, kept = found[case], found[*case[:2], *KEEP]
    assert mine["losses"] == kept["losses"]
    assert torch.equal(mine["scores"], kept["scores"])
    for name, weight in kept["weights"].items():
        assert torch.equal(mine["weights"][name], weight), name


def test_the_second_forward_drops_the_same_branches(found: dict[tuple[str, ...], dict[str, Any]]) -> None:
    """The cases above show it, provided that something is dropped in them."""
    assert found["no drop",]["losses"] != found["zero0", "fp32", *KEEP]["losses"]


def test_a_whole_run_with_it(tmp_path: Path) -> None:
    """All stages from the command line: stage 1's blocks and the tail's."""
    make_workplace(tmp_path)
    runs = {}
    for mode in ("keep", "checkpoint_offload"):
        run = tmp_path / mode
        done = run_train(tmp_path, "--recipe", "t.yaml", "--run-dir", str(run), *sets(f"activation={mode}"))
        assert done.code == 0, done.err
        runs[mode] = losses(run)
    assert runs["checkpoint_offload"] == runs["keep"]
    assert (
        "activations of the trained blocks: checkpoint_offload (torch)"
        in (tmp_path / "checkpoint_offload" / "console.log").read_text()
    )

"""`engine.reduction: tree`: the same bits on 1, 2 and 4 ranks, and what it cannot do is refused."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest
import torch
from commands import train_ranks
from ranks import run_ranks
from tiny_runs import RECIPE, losses, make_workplace, scores, sets
from toy_training import make_stage, save, start, train

from sfa_dist.errors import RecipeError
from sfa_dist.parallel.runtime import Runtime

KINDS = [(precision, optimizer) for precision in ("fp32", "bf16") for optimizer in ("sgd", "adamw")]
WORLDS = (1, 2, 4)
STEPS = 5
Sums = dict[tuple[str, str], str]


def sums(runtime: Runtime, root: Path) -> Sums:
    """sha256 of all losses, norms and final parameters; the last three steps go on from a checkpoint of half as many
    ranks."""
    out = {}
    for kind in KINDS:
        stage = make_stage("tree", *kind)
        engine = start(runtime, stage)
        values = train(runtime, engine, stage, range(2))
        save(runtime, engine, root / "-".join((*kind, str(runtime.world_size))), 2)
        before = root / "-".join((*kind, str(max(1, runtime.world_size // 2)))) / "step-00000002"
        engine = start(runtime, stage, before, 2)
        values += train(runtime, engine, stage, range(2, STEPS))
        digest = hashlib.sha256(b"".join(struct.pack("<2d", *pair) for pair in values))
        for _, tensor in sorted(engine.full_parameters().items()):
            digest.update(tensor.numpy().tobytes())
        out[kind] = digest.hexdigest()
    return out


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Sums]]:
    root = tmp_path_factory.mktemp("exact")
    return {world: run_ranks(world, sums, root) for world in WORLDS}


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_same_bits_on_any_ranks(by_ranks: dict[int, list[Sums]], kind: tuple[str, str]) -> None:
    assert len({rank[kind] for ranks in by_ranks.values() for rank in ranks}) == 1


def test_the_four_kinds_differ(by_ranks: dict[int, list[Sums]]) -> None:
    assert len(set(by_ranks[1][0].values())) == len(KINDS)


def test_same_bits_of_a_whole_run(tmp_path: Path) -> None:
    """All that a run writes down, with random drop-path: 24 clips in 3 steps of 4 micro-batches, both stages."""
    make_workplace(tmp_path, RECIPE.replace("temporal_depth: 1", "temporal_depth: 2, drop_path: 0.5"))
    found = []
    for world in WORLDS:
        run = tmp_path / f"on{world}"
        arguments = ("--recipe", "t.yaml", "--run-dir", str(run), *sets("engine.reduction=tree"))
        for process in train_ranks(world, tmp_path, *arguments):
            done = process.wait()
            assert done.code == 0, done.err
        weights = [(run / stage / "weights.safetensors").read_bytes() for stage in ("image", "stage1", "stage2")]
        found.append((losses(run), scores(run), [hashlib.sha256(file).hexdigest() for file in weights]))
    assert len(found[0][0]) == 3 * (1 + 2 + 2)
    assert found[0] == found[1] == found[2]


def refusal(runtime: Runtime) -> str:
    try:
        start(runtime, make_stage("tree", "fp32", "sgd"))
    except RecipeError as error:
        return str(error)
    return ""


def test_three_ranks_are_refused() -> None:
    for message in run_ranks(3, refusal):
        assert "power of two" in message
        assert "= 4, not 3 ranks" in message


def test_plain_sum_differs(by_ranks: dict[int, list[Sums]]) -> None:
    """What the tree is for: ZeRO-0 on the same batches does depend on the number of ranks."""
    digests = {
        torch.tensor(run_ranks(world, plain_losses)[0], dtype=torch.float64).numpy().tobytes() for world in (1, 2)
    }
    assert len(digests) == 2


def plain_losses(runtime: Runtime) -> list[tuple[float, float]]:
    stage = make_stage("zero0", "fp32", "sgd")
    return train(runtime, start(runtime, stage), stage, range(STEPS))

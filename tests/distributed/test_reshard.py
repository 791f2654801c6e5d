"""A checkpoint does not know what wrote it: other numbers of ranks and the other engine go on from the same state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch.multiprocessing import ProcessRaisedException
from toy_training import STEPS, make_stage, make_tail, save, start, train

from sfa_dist.parallel.engines.engine import Engine
from sfa_dist.parallel.runtime import Runtime

SAVED = 2
WRITERS = [("zero2", 2), ("fsdp", 2), ("zero2", 4), ("fsdp", 4), ("hybrid", 4)]
READERS = [("zero0", 1), ("zero3", 1), ("fsdp", 1), ("zero1", 3), ("fsdp", 3), ("hybrid", 4), ("fsdp", 2), ("zero2", 2)]
Place = tuple[str, int]  # (engine, ranks)
State = dict[tuple[str, str], torch.Tensor]


@dataclass
class Seen:
    """What one rank held and computed: (parameter, first element, tensors) of its fragments, and (loss, norm)s."""

    held: list[tuple[str, int, dict[str, torch.Tensor]]]
    owns: bool
    losses: list[tuple[float, float]]


def fragments(engine: Engine) -> list[tuple[str, int, dict[str, torch.Tensor]]]:
    return [(f.name, f.start, {key: value.clone() for key, value in f.tensors.items()}) for f in engine.fragments()]


def write(runtime: Runtime, engines: list[str], root: Path) -> dict[str, Seen]:
    """Trains to step 2, saves, and trains on."""
    out = {}
    for name in engines:
        stage = make_stage(name, "fp32", "adamw")
        engine = start(runtime, stage)
        train(runtime, engine, stage, range(SAVED))
        save(runtime, engine, folder(root, (name, runtime.world_size)), SAVED)
        held = fragments(engine)
        out[name] = Seen(held, runtime.rank < engine.owners, train(runtime, engine, stage, range(SAVED, STEPS)))
    return out


def read(runtime: Runtime, jobs: list[tuple[str, Path, Path]]) -> list[Seen]:
    """For each (engine, checkpoint folder, where to save it again): loads, saves what it loaded, trains on."""
    out = []
    for name, source, copy in jobs:
        stage = make_stage(name, "fp32", "adamw")
        engine = start(runtime, stage, source / f"step-{SAVED:08d}", SAVED)
        save(runtime, engine, copy, SAVED)
        held = fragments(engine)
        out.append(Seen(held, runtime.rank < engine.owners, train(runtime, engine, stage, range(SAVED, STEPS))))
    return out


def folder(root: Path, *places: Place) -> Path:
    return root / "-by-".join(f"{engine}x{ranks}" for engine, ranks in places)


def whole(ranks: list[Seen]) -> State:
    """The tensors of all ranks' fragments, put together by parameter name; each element comes from one rank."""
    shapes = {name: p.shape for name, p in make_tail(make_stage("zero0", "fp32", "adamw")).named_parameters()}
    state: State = {}
    for name, first, tensors in (piece for rank in ranks if rank.owns for piece in rank.held):
        for key, tensor in tensors.items():
            full = state.setdefault((name, key), torch.full((shapes[name].numel(),), torch.nan))
            assert full[first : first + tensor.numel()].isnan().all(), f"{name} {key}: owned twice"
            full[first : first + tensor.numel()] = tensor
    assert {name for name, _ in state} == set(shapes)
    return state


@dataclass
class Transfers:
    """The writers, and what came of each (writer, reader) and of each way back to ZeRO-2 on two ranks."""

    written: dict[Place, list[Seen]]
    read: dict[tuple[Place, Place], list[Seen]]
    back: dict[tuple[Place, Place], list[Seen]]


@pytest.fixture(scope="module")
def transfers(tmp_path_factory: pytest.TempPathFactory) -> Transfers:
    root = tmp_path_factory.mktemp("reshard")
    done = Transfers({}, {}, {})
    for ranks in (2, 4):
        engines = [engine for engine, world in WRITERS if world == ranks]
        seen = run_ranks(ranks, write, engines, root)
        done.written |= {(engine, ranks): [rank[engine] for rank in seen] for engine in engines}
    for ranks in (1, 3, 4, 2):  # Two ranks come last, because they also take the others' copies back.
        pairs = [(writer, reader) for reader in READERS if reader[1] == ranks for writer in WRITERS]
        ways_back = [pair for pair in done.read if pair[0] == ("zero2", 2)] if ranks == 2 else []
        jobs = [(reader[0], folder(root, writer), folder(root, writer, reader)) for writer, reader in pairs]
        jobs += [("zero2", folder(root, *pair), folder(root, *pair, ("zero2", 2))) for pair in ways_back]
        seen_jobs = list(zip(*run_ranks(ranks, read, jobs), strict=True))
        done.read |= {pair: list(seen) for pair, seen in zip(pairs, seen_jobs[: len(pairs)], strict=True)}
        done.back |= {pair: list(seen) for pair, seen in zip(ways_back, seen_jobs[len(pairs) :], strict=True)}
    return done


def assert_same_state(ranks: list[Seen], origin: list[Seen]) -> None:
    state, expected = whole(ranks), whole(origin)
    assert state.keys() == expected.keys()
    assert {key for _, key in state} == {"master", "exp_avg", "exp_avg_sq"}
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key


def named(place: Place) -> str:
    return f"{place[0]}x{place[1]}"


@pytest.mark.fault(27)
@pytest.mark.parametrize("reader", READERS, ids=named)
@pytest.mark.parametrize("writer", WRITERS, ids=named)
def test_goes_on_elsewhere(transfers: Transfers, writer: Place, reader: Place) -> None:
    """Masters and moments bit for bit; the losses that follow differ by the order of sums alone."""
    origin, seen = transfers.written[writer], transfers.read[writer, reader]
    assert_same_state(seen, origin)
    for (loss, norm), (expected_loss, expected_norm) in zip(seen[0].losses, origin[0].losses, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-5)


def test_ranks_that_share_no_copy_hold_the_same(transfers: Transfers) -> None:
    """Ranks 0 and 1 share one copy of the state, 2 and 3 the other."""
    ranks = transfers.written["hybrid", 4]
    assert [rank.owns for rank in ranks] == [True, True, False, False]
    for one, other in ((ranks[0], ranks[2]), (ranks[1], ranks[3])):
        assert [piece[:2] for piece in one.held] == [piece[:2] for piece in other.held]
        for (name, _, mine), (_, _, theirs) in zip(one.held, other.held, strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
    assert ranks[0].held[0][1] != ranks[1].held[0][1]


def test_a_copy_for_three_of_four_ranks_is_refused() -> None:
    with pytest.raises(ProcessRaisedException, match="shard_ranks is 3, which does not divide the 4 ranks"):
        run_ranks(4, start_three)


def start_three(runtime: Runtime) -> None:
    stage = make_stage("hybrid", "fp32", "adamw")
    start(runtime, stage.model_copy(update={"engine": stage.engine.model_copy(update={"shard_ranks": 3})}))


@pytest.mark.parametrize("reader", [reader for reader in READERS if reader[1] != 2], ids=named)
def test_comes_back(transfers: Transfers, reader: Place) -> None:
    """ZeRO-2 on two ranks, elsewhere, and back: as if it had never been away."""
    origin, seen = transfers.written["zero2", 2], transfers.back[("zero2", 2), reader]
    assert_same_state(seen, origin)
    assert seen[0].losses == origin[0].losses

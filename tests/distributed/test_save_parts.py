"""What several ranks write together: one file as if one rank had written it, one outcome for all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from torch.multiprocessing.spawn import ProcessExitedException
from toy_training import REPLICATED, make_stage, start, train

from sfa_dist import checkpoint as ckpt
from sfa_dist.checkpoint import files
from sfa_dist.checkpoint import saver as saver_module
from sfa_dist.checkpoint.failpoints import parse_failpoints
from sfa_dist.data.batches.feed import Streams
from sfa_dist.errors import CheckpointError, LostRankError
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.parallel.stop_flag import StopFlag
from sfa_dist.recipe.blocks import LogBlock
from sfa_dist.run.tracking import Tracker
from sfa_dist.training.progress import Progress
from sfa_dist.training.trainer import Trainer

RANKS = 3
ENGINES = ("zero0", "zero1", "zero2", "zero3", "fsdp")


def save_both_ways(runtime: Runtime, engines: list[str], root: Path) -> dict[str, Any]:
    """A step of each engine, saved by all ranks into one file and by rank 0 alone."""
    whole = {}
    for name in engines:
        stage = make_stage(name, "fp32", "adamw")
        engine = start(runtime, stage)
        train(runtime, engine, stage, range(1))
        for way, share in (("together", True), ("alone", False)):
            saver = ckpt.Saver(root / name / way, runtime, keep=1, share_file=share)
            saver.begin(1, engine, {"stage": "toy"})
            assert saver.finish() is not None
        whole[name] = engine.full_parameters()
    return whole


def fail_in_turn(runtime: Runtime, root: Path) -> list[Any]:
    """What each rank hears when one of them fails, is not finite, or finds a file that is damaged."""
    files.RETRY_DELAYS_S = (0.0, 0.0)
    stage = make_stage("zero3", "fp32", "adamw")
    engine = start(runtime, stage)
    train(runtime, engine, stage, range(1))
    heard: list[Any] = []

    def save(step: int, failpoints: str = "") -> None:
        saver = ckpt.Saver(root, runtime, 9, parse_failpoints(failpoints).within(rank=runtime.rank))
        try:
            saver.begin(step, engine, {"stage": "toy"})
            outcome = saver.finish()
            assert outcome is not None
            heard.append(outcome.refused)
        except CheckpointError as error:
            heard.append((str(error), error.print_suppressed))

    save(1)
    save(2, "save.write:enospc@rank=2")
    save(2, "save.stage:eio@rank=1")
    save(2, "save.before_commit:edquot@rank=0")
    if runtime.rank == 1:
        next(iter(engine.fragments())).tensors["exp_avg"][0] = torch.inf
    save(2)
    if runtime.rank == 1:
        next(iter(engine.fragments())).tensors["exp_avg"][0] = 0.0
    save(2)
    save(3)
    if runtime.rank == 2:  # Rank 1's disk alone is too full.
        saver_module.free_bytes = lambda _: 5  # type: ignore[assignment]
    save(4)
    runtime.barrier()
    if runtime.is_main:
        damaged = root / "step-00000003" / f"optimizer-00001-of-{RANKS:05d}.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    runtime.barrier()
    heard.append(ckpt.newest_valid(root, runtime))
    try:
        ckpt.newest_valid(root, runtime, parse_failpoints("load.read:eio@times=9,rank=2").within(rank=runtime.rank))
    except CheckpointError as error:
        heard.append((str(error), error.print_suppressed))
    return heard


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("parts")
    return root, run_ranks(RANKS, save_both_ways, list(ENGINES), root)[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_ranks_write_what_one_rank_would_write(saved: tuple[Path, dict[str, Any]], engine: str) -> None:
    root, whole = saved
    together, alone = (root / engine / way / "step-00000001" for way in ("together", "alone"))
    assert ckpt.verify(together) is None
    assert sorted(path.name for path in together.iterdir()) == sorted(path.name for path in alone.iterdir())
    for path in together.iterdir():
        assert path.read_bytes() == (alone / path.name).read_bytes(), path.name
    stored = load_file(together / "model.safetensors")
    assert stored.keys() == whole[engine].keys()
    assert all(torch.equal(stored[name], value) for name, value in whole[engine].items())
    writers = 1 if engine in REPLICATED else RANKS
    optimizers = sorted(together.glob("optimizer-*.safetensors"))
    assert [path.name[-14:-12] for path in optimizers] == [f"{writers:05d}"[-2:]] * writers


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Any]]]:
    root = tmp_path_factory.mktemp("heard")
    return root, run_ranks(RANKS, fail_in_turn, root)


@pytest.mark.fault(18, 19)
def test_one_rank_that_fails_fails_all_and_is_named(heard: tuple[Path, list[list[Any]]]) -> None:
    root, ranks = heard
    temporary = root / "step-00000002.tmp"
    for place, begins, reason in (
        (1, "rank 2 on ", f"could not write {temporary}: no space left, needed 0.1 MiB, have "),
        (2, "rank 1 on ", f"could not stage {temporary}: input/output error"),
        (
            3,
            "rank 0 on ",
            f"could not commit {root / 'step-00000002'}: the disk quota is used up (of bytes or of files) (EDQUOT)",
        ),
        (7, "rank 2 on ", f"could not write {root / 'step-00000004.tmp'}: no space left, needed 0.1 MiB, have "),
    ):
        said = {rank[place][0] for rank in ranks}
        assert len(said) == 1
        [text] = said
        assert text.startswith(begins)
        assert reason in text
        assert [rank[place][1] for rank in ranks] == [False, True, True]


@pytest.mark.fault(64)
def test_one_rank_that_is_not_finite_refuses_for_all(heard: tuple[Path, list[list[Any]]]) -> None:
    refused = {rank[4] for rank in heard[1]}
    assert len(refused) == 1
    assert "exp_avg of " in (text := refused.pop())
    assert text.endswith("is not finite on rank 1")


def test_a_save_that_failed_does_not_stand_in_the_way_of_the_next(heard: tuple[Path, list[list[Any]]]) -> None:
    assert [[rank[place] for place in (0, 5, 6)] for rank in heard[1]] == [[None] * 3] * RANKS


@pytest.mark.fault(20, 21, 30)
def test_the_ranks_verify_between_them(heard: tuple[Path, list[list[Any]]]) -> None:
    """Each hashes a part of the files, all take the same checkpoint."""
    root, ranks = heard
    fault = f"step-00000003: optimizer-00001-of-{RANKS:05d}.safetensors does not match its sha256"
    assert [rank[8] for rank in ranks] == [(root / "step-00000002", [fault])] * RANKS
    for rank in ranks:
        assert "cannot read" in rank[9][0]
        assert "input/output error" in rank[9][0]
    assert [rank[9][1] for rank in ranks] == [False, True, True]


def save_again(runtime: Runtime, root: Path, mark: str, failpoints: str) -> None:
    stage = make_stage("tree", "fp32", "adamw")
    saver = ckpt.Saver(root, runtime, 1, parse_failpoints(failpoints))
    saver.begin(3, start(runtime, stage), {"mark": mark})
    saver.finish()


@pytest.mark.fault(3)
def test_a_process_that_dies_between_the_two_renames_leaves_the_replaced_one(tmp_path: Path) -> None:
    """With keep 1 the one that is replaced is the only one: it goes when the new one stands."""
    run_ranks(1, save_again, tmp_path, "first", "")
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_ranks(1, save_again, tmp_path, "second", "save.between_renames:kill")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003.old", "step-00000003.tmp"]
    found, faults = ckpt.newest_valid(tmp_path)
    assert found is not None
    assert (ckpt.read_state(found)["mark"], faults) == ("first", [])
    run_ranks(1, save_again, tmp_path, "third", "")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    assert ckpt.read_state(tmp_path / "step-00000003")["mark"] == "third"


def refuse(runtime: Runtime, root: Path, key: str) -> tuple[list[dict[str, Any]], str]:
    """Saves until the run gives up, with NaN in one master value or moment: the events, and the last error."""
    stage = make_stage("zero2", "fp32", "adamw")
    engine = start(runtime, stage)
    train(runtime, engine, stage, range(1))
    tracker = Tracker(root, LogBlock(wandb="off"), {}, {})
    trainer = Trainer(
        name="stage2",
        stage=stage,
        seed=0,
        engine=engine,
        frozen=None,
        streams=Streams(1000, 1, lambda epoch, first: [], None),
        runtime=runtime,
        tracker=tracker,
        stop=StopFlag(),
        saver=ckpt.Saver(root, runtime, 1),
        state_extra={},
        log_every=1,
        progress=Progress(step=1),
    )
    trainer.save()
    next(iter(engine.fragments())).tensors[key][0] = torch.nan
    error = ""
    for step in range(2, 12):
        trainer.progress.step = step
        try:
            trainer.save()
            trainer.settle_save()
        except LostRankError as caught:
            error = str(caught)
            break
    tracker.close()
    return [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()], error


@pytest.mark.fault(64)
@pytest.mark.parametrize("key", ["master", "exp_avg"])
def test_what_is_not_finite_stops_the_run_when_it_stays(tmp_path: Path, key: str) -> None:
    [(lines, error)] = run_ranks(1, refuse, tmp_path, key)
    assert [(line["event"], line["step"]) for line in lines] == [
        ("checkpoint", 1),
        *(("checkpoint_refused", step) for step in range(2, 7)),
    ]
    assert all("finite" in line["reason"] for line in lines[1:])
    assert "step 6" in error
    assert "5 refused in a row" in error
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]

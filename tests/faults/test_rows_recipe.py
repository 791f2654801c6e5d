"""Rows 58 to 70 of the fault catalogue that no other test holds: logs that cannot be written, ranks that froze other
weights, and the audit that each clip is seen exactly once."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ONE_THREAD, TRAIN, Train, train
from data_samples import video_bytes, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import free_port
from tiny_runs import SHORT, START, losses, make_workplace, sets, write_clips
from torch import nn

from sfa_dist.data.batches.planned import LoaderSettings, train_plan
from sfa_dist.data.batches.stream import train_loader
from sfa_dist.data.shards.shard_index import load_index
from sfa_dist.data.video.decode import choose_decoder
from sfa_dist.models.frozen import FrozenTrunk
from sfa_dist.models.vivit import Trunk, build
from sfa_dist.recipe.blocks import AugmentBlock, BatchBlock, DataBlock, LogBlock, ModelBlock
from sfa_dist.run.tracking import Tracker


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("recipe rows"), SHORT)


@pytest.fixture(scope="module")
def plain(place: Path) -> Path:
    """A run to compare with."""
    finished = train(place, *START, "plain")
    assert finished.code == 0, finished.err
    return place / "plain"


# ------------------------------------------------------------------------------------------------ 65: what is frozen


class BatchNormOfTokens(nn.Module):
    """A layer whose statistics move in training, in place of a trunk's last norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(tokens.transpose(1, 2)).transpose(1, 2)


@pytest.mark.fault(65)
def test_row_65_running_statistics_of_the_trunk_stand_still() -> None:
    with torch.device("meta"):
        trunk = Trunk(ModelBlock(size="tiny", classes=2, image_size=16))
    build(trunk)
    trunk.encoder.norm = BatchNormOfTokens(trunk.width)  # type: ignore[assignment]
    frozen = FrozenTrunk(trunk, 4, dtype=torch.float32)
    before = frozen.sha256()
    frozen.train()
    frozen(torch.randint(0, 255, (1, 3, 4, 16, 16), dtype=torch.uint8))
    assert frozen.sha256() == before
    trunk.train()
    frozen(torch.randint(0, 255, (1, 3, 4, 16, 16), dtype=torch.uint8))
    assert frozen.sha256() != before  # they would have moved, and buffers are part of the hash


def ranks_in(*folders: Path, arguments: tuple[str, ...]) -> list[Train]:
    """One rank in each folder, as on nodes whose local disks differ."""
    world = str(len(folders))
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "test"}
    return [Train(folder, *arguments, RANK=str(n), LOCAL_RANK=str(n), **common) for n, folder in enumerate(folders)]


@pytest.mark.fault(65)
def test_row_65_another_trunk_on_one_rank_is_refused_at_the_start(place: Path, plain: Path, tmp_path: Path) -> None:
    """Weights of a finished stage 1 on node-local disks, and one of them is another run's."""
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    for node in nodes:
        shutil.copytree(place, node, ignore=shutil.ignore_patterns("outputs", "plain"))
        shutil.copy(plain / "stage1" / "weights.safetensors", node / "stage1.safetensors")
    finished = train(place, *START, "other seed", "--stage", "stage1", *sets("seed=9"))
    assert finished.code == 0, finished.err
    shutil.copy(place / "other seed" / "stage1" / "weights.safetensors", nodes[1] / "stage1.safetensors")
    own = sets("stage1.weights=stage1.safetensors")
    ended = [rank.wait() for rank in ranks_in(*nodes, arguments=(*START, str(tmp_path / "run"), *own))]
    assert [rank.code for rank in ended] == [78, 78]
    assert "the ranks disagree on the frozen trunk of stage2 (sha256): rank 1" in ended[0].err
    assert not (tmp_path / "run" / "stage2" / "checkpoints").exists()


@pytest.mark.fault(46)
def test_row_46_other_shards_on_one_rank_are_refused_at_the_start(place: Path, tmp_path: Path) -> None:
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    for node in nodes:
        shutil.copytree(place, node, ignore=shutil.ignore_patterns("outputs", "plain", "other seed"))
    shutil.rmtree(nodes[1] / "train")
    write_clips(nodes[1] / "train", 24, seed=5)
    ended = [rank.wait() for rank in ranks_in(*nodes, arguments=(*START, str(tmp_path / "run")))]
    assert [rank.code for rank in ended] == [78, 78]
    assert "the ranks disagree on the clips of stage1.data.train" in ended[0].err
    assert "rank 1" in ended[0].err


# ------------------------------------------------------------------------------------------------ 68: logs


def run_with_stdout(place: Path, name: str, stdout: int) -> subprocess.CompletedProcess[bytes]:
    environ = {**os.environ, **ONE_THREAD}
    command = [sys.executable, TRAIN, *START, name, "--stage", "stage1"]
    return subprocess.run(
        command, cwd=place, env=environ, stdout=stdout, stderr=subprocess.PIPE, timeout=120, check=False
    )


@pytest.mark.fault(68)
@pytest.mark.parametrize("kind", ["closed pipe", "full disk"])
def test_row_68_a_console_that_is_gone_does_not_stop_the_run(place: Path, plain: Path, kind: str) -> None:
    if kind == "closed pipe":
        reader, stdout = os.pipe()
        os.close(reader)
    else:
        stdout = os.open("/dev/full", os.O_WRONLY)
    try:
        finished = run_with_stdout(place, kind, stdout)
    finally:
        os.close(stdout)
    assert finished.returncode == 0, finished.stderr
    expected = {key: value for key, value in losses(plain).items() if key[0] == "stage1"}
    assert losses(place / kind) == expected
    said = (place / kind / "console.log").read_text().splitlines()
    assert sum(line.startswith("Train stage") for line in said) == len(expected)


@pytest.fixture
def room() -> Iterator[list[int]]:
    """room[0] is the size that files of this process may have; writing more fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Room(list[int]):
        def __setitem__(self, _: object, size: object) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), before[1]))  # type: ignore[call-overload]

    yield Room()
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.fault(68)
def test_row_68_lines_wait_for_room_on_a_full_disk(
    tmp_path: Path, room: list[int], capfd: pytest.CaptureFixture
) -> None:
    log = Tracker(tmp_path, LogBlock(wandb="off"), {}, {})
    for step in range(20):
        if step == 5:
            room[0] = (tmp_path / "log.jsonl").stat().st_size + 20  # the sixth line is cut in its middle
        if step == 15:
            room[0] = 1 << 30
        log.record("train", step=step, loss=1 / 3)
        log.say(f"step {step}")
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(20))
    assert (tmp_path / "console.log").read_text().splitlines() == [f"step {step}" for step in range(20)]
    told = capfd.readouterr().err
    assert told.count("log.jsonl cannot be written") == 1
    assert "the run goes on" in told


@pytest.mark.fault(68)
def test_row_68_lines_that_never_find_room_are_told(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log = Tracker(tmp_path, LogBlock(wandb="off"), {}, {})
    for step in range(3):
        log.record("train", step=step)
    log.close()
    assert "lacks its last 3 lines" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------ 70: the audit

CLIP = video_bytes()


@pytest.mark.fault(44, 70)
@given(
    shards=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    batch=st.integers(1, 9),
    micro=st.integers(1, 3),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=25, deadline=None)
def test_row_70_each_clip_is_trained_on_or_in_the_ledger_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, shards: list[int], batch: int, micro: int, seed: int
) -> None:
    """Over epochs, with bad clips anywhere, killed anywhere, and resumed on another number of ranks each time."""
    rng = random.Random(seed)
    folder = tmp_path_factory.mktemp("audit")
    names, bad = [], set()
    for shard, clips in enumerate(shards):
        samples: list[tuple[str, bytes, object]] = []
        for number in range(clips):
            is_bad = rng.random() < 0.3
            samples.append((f"c{number}", b"<html>" if is_bad else CLIP, 0))
            names.append(f"s{shard}.tar/c{number}")
            bad |= {names[-1]} if is_bad else set()
        write_shard(folder / f"s{shard}.tar", samples)
    index = load_index(sorted(folder.glob("*.tar")))
    data = DataBlock(workers=0, decoder="pyav", shuffle_shards=rng.randint(1, 3), resize=16, stride=1)
    blocks = BatchBlock(size=batch, micro=micro)
    plan = train_plan(index, data, blocks, seed)
    decoder = choose_decoder("pyav")
    for epoch in range(2):
        trained: Counter[str] = Counter()
        ledger: Counter[str] = Counter()
        step = 0
        while step < plan.steps_per_epoch:
            world = rng.randint(1, 5)
            stop = rng.randint(step + 1, plan.steps_per_epoch)  # the state of the last step before the kill
            for rank in range(world):
                settings = LoaderSettings(data, blocks, AugmentBlock(), 2, 16, seed, rank, world, decoder)
                loader = train_loader(index, settings, epoch=epoch, start_step=step)
                accumulation = plan.accumulation(world, micro)
                for _, one in zip(range((stop - step) * accumulation), loader, strict=False):
                    ids = one.ids[one.weights > 0].tolist()
                    trained.update(index.name(sample) for sample in ids)
                    ledger.update(key for key, _ in one.bad)
            step = stop
        assert trained + ledger == Counter(names)
        assert set(ledger) == bad


@pytest.mark.fault(70)
def test_row_70_loader_processes_do_not_change_the_audit(tmp_path: Path) -> None:
    samples: list[tuple[str, bytes, object]] = [(f"c{n}", b"" if n % 5 == 3 else CLIP, 0) for n in range(17)]
    index = load_index([write_shard(tmp_path / "s.tar", samples)])
    seen = []
    for workers in (0, 2):
        data = DataBlock(workers=workers, decoder="pyav", resize=16, stride=1)
        settings = LoaderSettings(data, BatchBlock(size=5, micro=2), AugmentBlock(), 2, 16, seed=1, world_size=3)
        loaders = [train_loader(index, replace(settings, rank=rank), epoch=0) for rank in range(3)]
        batches = [batch for loader in loaders for batch in loader]
        ids = np.concatenate([batch.ids[batch.weights > 0] for batch in batches])
        seen.append((ids.tolist(), [key for batch in batches for key, _ in batch.bad]))
    assert seen[0] == seen[1]
    assert sorted(seen[0][0]) == [n for n in range(17) if n % 5 != 3]
    assert sorted(seen[0][1]) == sorted(f"s.tar/c{n}" for n in range(17) if n % 5 == 3)

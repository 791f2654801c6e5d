"""Waiting for batches: what becomes of the workers is told by name, and a stop request ends the wait."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from data_samples import video_bytes, write_shard
from faulty_decoder import faulty_decoder

from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.feed import CRASHES, FeedSettings, feed
from sfa_dist.data.batches.planned import LoaderSettings
from sfa_dist.data.batches.stream import eval_loader
from sfa_dist.data.shards.quarantine import read_quarantine, without_quarantined
from sfa_dist.data.shards.shard_index import SampleIndex, load_index
from sfa_dist.errors import CheckpointError, LostRankError
from sfa_dist.parallel.process_state import state_of
from sfa_dist.recipe.blocks import AugmentBlock, BatchBlock, DataBlock

CLIPS = 8
VICTIM = 5


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    """Each clip has its own length, so its own bytes."""
    folder = tmp_path_factory.mktemp("shards")
    samples = [(f"clip{number:04d}", video_bytes(6 + number), number % 3) for number in range(CLIPS)]
    return load_index([write_shard(folder / "a.tar", samples[:3]), write_shard(folder / "b.tar", samples[3:])])


@pytest.fixture(autouse=True)
def as_in_a_run() -> Iterator[None]:
    """No loader was started by the main thread, where torch sets a handler that raises in the midst of anything."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, before)


def crc(index: SampleIndex, sample: int) -> int:
    return int(index.crc32[sample])


def loader(index: SampleIndex, action: str = "", workers: int = 2, crc32: int = 0):
    data = DataBlock(resize=28, stride=1, workers=workers, decoder="pyav")
    decoder = faulty_decoder(action, crc32) if action else None
    return eval_loader(
        index, LoaderSettings(data, BatchBlock(size=2, micro=2), AugmentBlock(), frames=4, crop=24, decoder=decoder)
    )


def place(folder: Path, patience: float = 60.0) -> FeedSettings:
    return FeedSettings("rank 3 on node7", folder / "quarantine.jsonl", folder / "logs" / "rank-00003.loader", patience)


def same(a: Batch, b: Batch) -> bool:
    return (
        all(torch.equal(getattr(a, key), getattr(b, key)) for key in ("clips", "labels", "weights", "ids"))
        and a.bad == b.bad
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_it_gives_what_the_loader_gives(index: SampleIndex, tmp_path: Path, workers: int) -> None:
    fed = list(feed(loader(index, workers=workers), place(tmp_path)))
    plain = list(loader(index, workers=workers))
    assert len(fed) == len(plain) == CLIPS // 2
    assert all(same(a, b) for a, b in zip(fed, plain, strict=True))
    assert multiprocessing.active_children() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_request_does_not_wait_for_the_batch(index: SampleIndex, tmp_path: Path, workers: int) -> None:
    asked = threading.Event()
    threading.Timer(1.0, asked.set).start()
    started = time.monotonic()
    assert list(feed(loader(index, "slow 1000", workers), place(tmp_path), asked.is_set)) == []
    assert time.monotonic() - started < 30
    assert multiprocessing.active_children() == []  # Not even the one that is still at it.


@pytest.mark.fault(5)
def test_a_killed_worker_is_named_with_its_clip(index: SampleIndex, tmp_path: Path) -> None:
    killer = loader(index, "SIGKILL", crc32=crc(index, VICTIM))
    with pytest.raises(LostRankError) as caught:
        list(feed(killer, place(tmp_path)))
    said = str(caught.value)
    assert said.startswith("rank 3 on node7: loader worker ")
    assert "was ended by SIGKILL at clip b.tar/clip0005; " in said
    assert "fewer data.workers" in said
    assert not (tmp_path / "quarantine.jsonl").exists()  # The system does that where memory is short.
    assert multiprocessing.active_children() == []


@pytest.mark.fault(6)
@pytest.mark.parametrize("number", CRASHES, ids=lambda number: number.name)
def test_a_crash_quarantines_its_clip(index: SampleIndex, tmp_path: Path, number, capfd) -> None:
    crashing = loader(index, number.name, crc32=crc(index, VICTIM))
    with pytest.raises(LostRankError) as caught:
        list(feed(crashing, place(tmp_path)))
    assert f"was ended by {number.name} at clip b.tar/clip0005; " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "faulty_decoder.py" in (tmp_path / "logs" / "rank-00003.loader").read_text()
    assert capfd.readouterr().err == ""

    [entry] = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    reason = f"its decoder was ended by {number.name}"
    assert entry == {"shard": "b.tar", "key": "clip0005", "reason": reason}
    healed = without_quarantined(index, read_quarantine(tmp_path / "quarantine.jsonl"))
    assert healed.sha256 == index.sha256
    batches = list(feed(loader(healed), place(tmp_path)))
    assert [bad for batch in batches for bad in batch.bad] == [("b.tar/clip0005", f"quarantined: {reason}")]
    assert sum(float(batch.weights.sum()) for batch in batches) == CLIPS - 1


@pytest.mark.fault(57)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_decoder_that_hangs_is_named(index: SampleIndex, tmp_path: Path, workers: int) -> None:
    with pytest.raises(LostRankError, match=r"loader worker 0 has been at clip a.tar/clip0000 for 1 s"):
        list(feed(loader(index, "hang", workers), place(tmp_path, patience=1.0)))
    assert multiprocessing.active_children() == []


def test_a_worker_that_stands_still_is_told_before_the_run_ends(
    index: SampleIndex, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Stopped by a signal between two clips or at one, it is told, waited for, and goes on."""
    where = dataclasses.replace(place(tmp_path), report_after=1.0, state_of=state_of)
    batches = feed(loader(index, "slow 0.1", 1), where)
    taken = [next(batches)]
    [worker] = multiprocessing.active_children()
    assert worker.pid
    os.kill(worker.pid, signal.SIGSTOP)
    threading.Timer(2.5, os.kill, (worker.pid, signal.SIGCONT)).start()
    taken += batches
    assert sum(float(batch.weights.sum()) for batch in taken) == CLIPS
    line, *_ = capfd.readouterr().err.splitlines()  # On a busy machine it may stand still again.
    assert line.startswith("warning: rank 3 on node7: loader worker 0 has been ")
    assert f"(process {worker.pid}, stopped by a signal, kill -CONT resumes it)" in line
    assert line.endswith("; still waiting, the run ends after 60 s")


def test_a_quarantine_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    assert read_quarantine(file) == {}
    file.write_text('{"shard": "a", "key": "b", "reason": "c"}\n{"shard"\n')
    with pytest.raises(CheckpointError, match=r"quarantine\.jsonl:2 "):
        read_quarantine(file)

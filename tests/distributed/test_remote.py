"""Runs that read their shards from a server or a pipe: the same losses as from files, whatever happens on the way."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import train, train_ranks
from shard_servers import FileServer, file_server
from tiny_runs import SHORT, START, events, log_lines, losses, make_workplace, scores, sets

from sfa_dist.data.shards.shard_index import build_index


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workplace(tmp_path_factory.mktemp("remote"), SHORT)
    for split in ("train", "val"):
        build_index(sorted((folder / split).glob("*.tar")))
    return folder


@pytest.fixture(scope="module")
def from_files(place: Path) -> Path:
    finished = train(place, *START, "files")
    assert finished.code == 0, finished.err
    return place / "files"


@pytest.fixture
def server(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with file_server(place) as server:
        yield server


def shards(prefix: str, **remote: object) -> list[str]:
    """Overrides: both splits from `prefix`, and the keys of data.remote."""
    splits = [f"data.{split}=['{prefix}{split}/part-00000{{0..1}}.tar']" for split in ("train", "val")]
    return sets(*splits, f"data.remote={json.dumps(remote)}")


def same(run: Path, other: Path) -> bool:
    return losses(run) == losses(other) and scores(run) == scores(other) and len(losses(run)) == 6


def test_http_gives_the_same_losses(place: Path, from_files: Path, server: FileServer) -> None:
    finished = train(place, *START, "http", *shards(f"{server.url}/", allow=["http"]), *sets("data.workers=2"))
    assert finished.code == 0, finished.err
    assert same(place / "http", from_files)


@pytest.mark.fault(47)
def test_a_server_that_stumbles_and_stalls_changes_nothing(place: Path, from_files: Path, server: FileServer) -> None:
    server.faults = [503, "cut", 0.0, 1.5, "reset", 500] * 4
    finished = train(place, *START, "stumbling", *shards(f"{server.url}/", allow=["http"]))
    assert finished.code == 0, finished.err
    assert server.faults == []
    assert same(place / "stumbling", from_files)
    assert events(place / "stumbling", "bad_sample") == []


def test_pipes_give_the_same_losses_to_a_run_that_began_from_files(place: Path, from_files: Path) -> None:
    """Where the shards lie is no part of what a run is."""
    shutil.copytree(from_files, place / "pipe")
    shutil.rmtree(place / "pipe" / "stage2")
    finished = train(place, *START, "pipe", *shards(f"pipe:cat {place}/", allow=["pipe"], cache_dir="pipe cache"))
    assert finished.code == 0, finished.err
    assert same(place / "pipe", from_files)
    again = [
        line["step"] for line in log_lines(place / "pipe") if line["kind"] == "train" and line["stage"] == "stage2"
    ]
    assert again == [1, 2, 3, 1, 2, 3]


def test_two_ranks_share_one_cache(place: Path, from_files: Path, server: FileServer) -> None:
    """Rank 0 alone indexes what has no index; both read through the cache, with workers of their own."""
    (place / "bare").mkdir()
    for split in ("train", "val"):
        shutil.copytree(place / split, place / "bare" / split, ignore=lambda *_: ["index.json"])
    before = server.gets.copy()
    ranks = train_ranks(
        2,
        place,
        *START,
        "ranks",
        *shards(f"{server.url}/bare/", allow=["http"], cache_dir="node cache"),
        *sets("data.workers=1"),
    )
    for rank in ranks:
        finished = rank.wait()
        assert finished.code == 0, finished.err
    assert losses(place / "ranks").keys() == losses(from_files).keys()
    asked = server.gets - before
    # To be indexed each is fetched once (a look and a piece) and it stays; later starts of a stage look at its size.
    whole = sum(path.stat().st_size for path in (place / "bare").glob("*/part-*.tar"))
    assert server.bytes_sent < 2 * whole
    assert len(list((place / "node cache" / "shards").iterdir())) == 4
    assert asked["bare/train/part-000000.tar"] <= 6


def test_a_shard_that_goes_away_during_the_run_is_bad_samples_and_ends_it_over_the_budget(
    place: Path, server: FileServer
) -> None:
    server.faults = [0.0] * 4 + [404] * 10_000  # the look at each shard before the run, and then nothing more
    finished = train(place, *START, "gone", *shards(f"{server.url}/", allow=["http"]))
    assert finished.code == 65
    assert "over data.max_bad_fraction" in finished.err
    bad = events(place / "gone", "bad_sample")
    assert f"{server.url}/train/part-" in bad[0]["reason"]
    assert "not found (HTTP 404)" in bad[0]["reason"]
    assert not [line for line in log_lines(place / "gone") if line["kind"] == "train" and line["stage"] == "stage2"]


@pytest.mark.fault(42)
def test_what_the_recipe_does_not_allow_is_78_at_its_line(place: Path) -> None:
    (place / "pipe.yaml").write_text(SHORT.replace('train: ["train/*.tar"]', f'train: ["pipe:touch {place}/ran"]'))
    finished = train(place, "--recipe", "pipe.yaml", "--run-dir", "refused")
    assert finished.code == 78
    line = SHORT.split("\n").index('  train: ["train/*.tar"]') + 1
    assert finished.err.startswith(f"error: pipe.yaml:{line}: data.train: 'pipe:touch {place}/ran': pipe is off: set ")
    assert "data.remote.allow: [pipe] and data.remote.cache_dir: FOLDER" in finished.err
    assert finished.err.count("\n") == 1
    assert not (place / "ran").exists()


def test_a_cache_without_room_for_a_pipe_is_65_in_one_line(place: Path, tmp_path: Path) -> None:
    """Found by a loader worker, which is another process."""
    size = max(path.stat().st_size for path in place.glob("*/part*.tar"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size // 4096 * 4096 * 3 // 2}", "tmpfs", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        keys = shards(f"pipe:cat {place}/", allow=["pipe"], cache_dir=str(tmp_path))
        assert train(place, *START, "room", *keys, "--dry-run").code == 0  # it is indexed, one shard at a time
        for path in (tmp_path / "shards").iterdir():
            path.unlink()
        (tmp_path / "somebody else's").write_bytes(bytes(size))
        finished = train(place, *START, "room", *keys, *sets("data.workers=1"))
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
    assert finished.code == 65, finished.err
    last = finished.err.strip().splitlines()[-1]
    assert last.startswith(f"error: pipe:cat {place}/train/part-0")
    assert "must be kept in the cache, which cannot hold it" in last
    assert "Traceback" not in finished.err

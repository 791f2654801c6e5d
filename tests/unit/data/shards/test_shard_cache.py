"""The cache of whole shards: its limit, its locks, and what killed processes, full and read-only disks do to it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from data_samples import write_shard
from shard_servers import FileServer, file_server

from sfa_dist.data.shards import reader, retry, shard_cache
from sfa_dist.data.shards.reader import read_clip_bytes
from sfa_dist.data.shards.shard_cache import CannotKeepError, ShardCache, Whole
from sfa_dist.data.shards.shard_index import SampleIndex, build_index, load_index
from sfa_dist.data.shards.shard_names import expand_shards
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.errors import DataError
from sfa_dist.recipe.blocks import RemoteBlock

CLIP = 60_000  # bytes; a shard of one clip is rounded up by tar
SHARD = 71_680
forks = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(shard_cache, "USED_EVERY", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    reader._cache.cache_clear()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    """Four shards of one clip each."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(4):
        write_shard(folder / f"s-{number}.tar", [("k", os.urandom(CLIP), number)])
        assert (folder / f"s-{number}.tar").stat().st_size == SHARD
    build_index(sorted(folder.glob("*.tar")))
    with file_server(folder) as server:
        yield server


def load(server: FileServer, cache: Path, shards: float | None = None, retries: int = 2) -> SampleIndex:
    """The four shards through a cache that has room for `shards` of them."""
    room = None if shards is None else shards * SHARD / 2**30
    remote = RemoteBlock(allow=["http"], cache_dir=str(cache), cache_gib=room, retries=retries)
    return load_index(expand_shards([f"{server.url}/s-{{0..3}}.tar"], remote), remote)


def kept(index: SampleIndex, cache: Path) -> list[int]:
    """Numbers of the shards that are in the cache."""
    names = {path.name for path in (cache / "shards").iterdir()}
    found = [number for number, sha256 in enumerate(index.shard_sha256) if f"{sha256}.tar" in names]
    assert len(found) == len(names), names
    return found


def whole(index: SampleIndex, number: int) -> Whole:
    return Whole(str(index.shards[number]), int(index.shard_bytes[number]), index.shard_sha256[number])


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_least_recently_used_shards_make_room(server: FileServer, tmp_path: Path) -> None:
    index = load(server, tmp_path / "c", shards=2.5)
    for number, expected in ((0, [0]), (1, [0, 1]), (0, [0, 1]), (2, [0, 2]), (3, [2, 3]), (2, [2, 3]), (0, [0, 2])):
        read_clip_bytes(index, number)
        assert kept(index, tmp_path / "c") == expected
        time.sleep(0.01)  # the clock that tells which was used last has ticks


def test_what_is_kept_is_not_fetched_again_and_an_open_shard_survives_its_eviction(
    server: FileServer, tmp_path: Path
) -> None:
    index = load(server, tmp_path / "c", shards=1)
    cache = ShardCache(index.remote)
    with cache.open(whole(index, 0)) as file:
        before = server.gets.copy()
        cache.open(whole(index, 0)).close()
        assert server.gets == before
        cache.open(whole(index, 1)).close()
        assert kept(index, tmp_path / "c") == [1]
        file.seek(0)
        assert file.read() == (server.folder / "s-0.tar").read_bytes()


def test_a_limit_below_one_shard_reads_by_range_with_one_warning(server: FileServer, tmp_path: Path) -> None:
    index = load(server, tmp_path / "c", shards=0.5)
    local = load_index(sorted(server.folder.glob("*.tar")))
    with pytest.warns(UserWarning, match=r"the shard cache on \S+ cannot be used .*no room for 71680 bytes") as caught:
        clips = [read_clip_bytes(index, sample) for sample in (0, 1, 2, 3, 0)]
    assert len(caught) == 1
    assert clips == [read_clip_bytes(local, sample) for sample in (0, 1, 2, 3, 0)]
    assert kept(index, tmp_path / "c") == []


def _read_all(index: SampleIndex, start: str, answers: str, number: int) -> None:
    while not os.path.exists(start):
        time.sleep(0.001)
    data = [read_clip_bytes(index, (sample + number) % 4) for sample in range(4)]
    Path(answers, str(number)).write_text(str(sum(map(len, data))))


def test_many_processes_fetch_each_shard_once(server: FileServer, tmp_path: Path) -> None:
    index = load(server, tmp_path / "c")
    answers, start = tmp_path / "answers", tmp_path / "start"
    answers.mkdir()
    before = server.bytes_sent
    processes = [forks.Process(target=_read_all, args=(index, str(start), str(answers), n)) for n in range(6)]
    for process in processes:
        process.start()
    start.touch()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert {path.read_text() for path in answers.iterdir()} == {str(4 * CLIP)}
    assert server.bytes_sent - before == 4 * (SHARD + 1)  # each shard once, and a byte to learn its size


def test_processes_in_a_cache_that_is_too_small_still_read_the_right_bytes(server: FileServer, tmp_path: Path) -> None:
    """They evict one another's shards all the time, also those that have just been fetched."""
    index = load(server, tmp_path / "c", shards=1.5)
    answers, start = tmp_path / "answers", tmp_path / "start"
    answers.mkdir()
    processes = [forks.Process(target=_read_all, args=(index, str(start), str(answers), n)) for n in range(4)]
    for process in processes:
        process.start()
    start.touch()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(answers.iterdir())) == 4
    assert len(kept(index, tmp_path / "c")) == 1


def test_a_killed_fetch_leaves_nothing_that_is_taken_for_a_shard(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfa_dist.data.shards.fetch.CHUNK", SHARD // 4)
    index = load(server, tmp_path / "c", shards=1.5)
    server.faults = [0.0, 0.0, 60.0]  # what it is, the first quarter, and then the server hangs
    process = forks.Process(target=read_clip_bytes, args=(index, 0))
    process.start()
    wait_until(lambda: server.faults == [])
    part = next((tmp_path / "c" / "shards").iterdir())
    assert part.name.endswith(".part")
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(30)
    assert part.exists()
    assert read_clip_bytes(index, 1)  # whoever makes room next removes it: it held the place of a shard
    assert kept(index, tmp_path / "c") == [1]
    assert read_clip_bytes(index, 0)


def test_a_part_that_is_being_fetched_keeps_its_place(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfa_dist.data.shards.fetch.CHUNK", SHARD // 4)
    index = load(server, tmp_path / "c", shards=1.5)
    server.faults = [0.0, 0.0, 1.0]
    process = forks.Process(target=read_clip_bytes, args=(index, 0))
    process.start()
    wait_until(lambda: server.faults == [])
    with pytest.raises(CannotKeepError, match="no room"):
        ShardCache(index.remote).open(whole(index, 1))
    process.join(30)
    assert (process.exitcode, kept(index, tmp_path / "c")) == (0, [0])


def test_a_shard_that_is_not_what_its_index_says_is_not_kept(server: FileServer, tmp_path: Path) -> None:
    index = load(server, tmp_path / "c")
    data = bytearray((server.folder / "s-0.tar").read_bytes())
    data[-1] ^= 1
    (server.folder / "s-0.tar").write_bytes(data)
    (server.folder / "s-1.tar").write_bytes(data[:-512])
    for number, said in ((0, "sha256 is not what its index says"), (1, f"{SHARD - 512} bytes came, its index says")):
        before = server.bytes_sent
        for _ in range(3):
            with pytest.raises(BadSample, match=said) as caught:
                read_clip_bytes(index, number)
            assert f"{server.url}/s-{number}.tar" in caught.value.reason
        assert server.bytes_sent - before <= SHARD + 1  # the other samples of the shard do not fetch it again
    assert kept(index, tmp_path / "c") == []


def test_a_kept_shard_that_was_cut_afterwards_is_fetched_again(server: FileServer, tmp_path: Path) -> None:
    index = load(server, tmp_path / "c")
    clip = read_clip_bytes(index, 0)
    path = tmp_path / "c" / "shards" / f"{index.shard_sha256[0]}.tar"
    path.write_bytes(path.read_bytes()[:100])
    assert read_clip_bytes(index, 0) == clip
    assert path.stat().st_size == SHARD


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own with room for one shard and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SHARD * 3 // 2 // 4096 * 4096}", "tmpfs", place], capture_output=True
    )
    if done.returncode:
        pytest.skip("needs the right to mount a small disk")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_reads_by_range_with_one_warning(server: FileServer, small_disk: Path) -> None:
    (small_disk / "somebody else's").write_bytes(bytes(SHARD))
    index = load(server, small_disk / "c")
    local = load_index(sorted(server.folder.glob("*.tar")))
    with pytest.warns(UserWarning, match=r"the shard cache on \S+ cannot be used") as caught:
        clips = [read_clip_bytes(index, sample) for sample in range(4)]
    assert len(caught) == 1
    assert clips == [read_clip_bytes(local, sample) for sample in range(4)]


def test_a_disk_that_fills_up_while_a_shard_is_fetched(
    server: FileServer, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, where the free space promised more than there was."""
    (small_disk / "somebody else's").write_bytes(bytes(SHARD))
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Plenty)
    index = load(server, small_disk / "c")
    with pytest.warns(UserWarning, match=r"the shard cache on \S+ cannot be used .*No space left"):
        assert len(read_clip_bytes(index, 0)) == CLIP
    assert kept(index, small_disk / "c") == []


class _Plenty:
    free = 10**12


def test_the_cache_makes_room_for_itself_on_a_full_disk(server: FileServer, small_disk: Path) -> None:
    index = load(server, small_disk / "c")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(4):
            read_clip_bytes(index, number)
            assert kept(index, small_disk / "c") == [number]


def test_a_full_disk_ends_a_run_that_reads_a_pipe(server: FileServer, tmp_path: Path, small_disk: Path) -> None:
    pattern = f"pipe:cat {server.folder}/s-{{0..1}}.tar"
    remote = RemoteBlock(allow=["pipe"], cache_dir=str(small_disk / "c"), retries=0)
    index = load_index(expand_shards([pattern], remote), remote)
    for path in (small_disk / "c" / "shards").iterdir():
        path.unlink()
    (small_disk / "somebody else's").write_bytes(bytes(SHARD))
    with pytest.raises(
        DataError, match=r"pipe:cat .*s-0\.tar must be kept in the cache, which cannot hold it .*larger"
    ):
        read_clip_bytes(index, 0)


def test_a_complete_cache_works_where_nothing_can_be_written(server: FileServer, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    pattern = f"pipe:cat {server.folder}/s-{{0..2}}.tar"
    remote = RemoteBlock(allow=["pipe", "http"], cache_dir=str(small_disk / "c"), retries=0)

    def clips() -> list[bytes]:
        reader._cache.cache_clear()
        index = load_index(expand_shards([pattern], remote), remote)
        return [read_clip_bytes(index, sample) for sample in range(3)]

    expected = clips()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clips() == expected
    index = load(server, small_disk / "c")
    assert len(read_clip_bytes(index, 0)) == CLIP  # the same content by another name: it is there
    with pytest.warns(UserWarning, match=r"cannot be used .*Read-only"):
        assert len(read_clip_bytes(index, 3)) == CLIP


# ------------------------------------------------------------------------------ shards of a shared file system


def staged(server: FileServer, cache: Path) -> SampleIndex:
    """The four shards as files, staged to `cache`."""
    remote = RemoteBlock(cache_dir=str(cache), stage=True, retries=0)
    return load_index(sorted(server.folder.glob("*.tar")), remote)


def test_staged_shards_are_read_from_the_cache(server: FileServer, tmp_path: Path) -> None:
    plain = load_index(sorted(server.folder.glob("*.tar")))
    expected = [read_clip_bytes(plain, sample) for sample in range(4)]
    index = staged(server, tmp_path / "c")
    assert [read_clip_bytes(index, sample) for sample in range(4)] == expected
    assert kept(index, tmp_path / "c") == [0, 1, 2, 3]
    for shard in server.folder.glob("*.tar"):
        shard.unlink()
    assert [read_clip_bytes(index, sample) for sample in range(4)] == expected


def test_without_stage_files_are_read_where_they_are(server: FileServer, tmp_path: Path) -> None:
    remote = RemoteBlock(cache_dir=str(tmp_path / "c"), retries=0)
    read_clip_bytes(load_index(sorted(server.folder.glob("*.tar")), remote), 0)
    assert not (tmp_path / "c").exists()
    with pytest.raises(ValueError, match="has no folder for the shards"):
        RemoteBlock(stage=True)


def test_staging_changes_nothing_about_a_damaged_shard(tmp_path: Path) -> None:
    """The clip that is damaged is bad, its neighbour in the shard is not."""
    shard = tmp_path / "s-0.tar"
    write_shard(shard, [("a", os.urandom(CLIP), 0), ("b", os.urandom(CLIP), 1)])
    build_index([shard])
    index = load_index([shard], RemoteBlock(cache_dir=str(tmp_path / "c"), stage=True, retries=0))
    good = read_clip_bytes(load_index([shard]), 1)
    with shard.open("r+b") as file:
        file.seek(int(index.offset[0]) + 100)
        file.write(os.urandom(100))
    reader._cache.cache_clear()
    assert read_clip_bytes(index, 1) == good
    with pytest.raises(BadSample, match="crc32"):
        read_clip_bytes(index, 0)
    assert list((tmp_path / "c" / "shards").iterdir()) == []


def test_a_full_disk_reads_staged_shards_where_they_are(server: FileServer, small_disk: Path) -> None:
    index = staged(server, small_disk / "c")
    (small_disk / "other").write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
    plain = load_index(sorted(server.folder.glob("*.tar")))
    with pytest.warns(UserWarning, match=r"the shard cache on \S+ cannot be used .*") as caught:
        assert [read_clip_bytes(index, n) for n in range(4)] == [read_clip_bytes(plain, n) for n in range(4)]
    assert len(caught) == 1

"""Shards that are not local files: the same samples over http and pipes, and what happens when a server stumbles."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from data_samples import write_shard, write_shards
from shard_servers import FileServer, file_server

from sfa_dist.data.batches.planned import LoaderSettings
from sfa_dist.data.batches.stream import train_loader
from sfa_dist.data.shards import remote_index, retry
from sfa_dist.data.shards.index_file import read_columns
from sfa_dist.data.shards.reader import read_clip_bytes
from sfa_dist.data.shards.remote_index import index_home
from sfa_dist.data.shards.shard_index import SampleIndex, build_index, load_index
from sfa_dist.data.shards.shard_names import expand_shards, shard_folder, shard_name, shown
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.errors import DataError, UsageError
from sfa_dist.recipe.blocks import AugmentBlock, BatchBlock, DataBlock, RemoteBlock
from sfa_dist.tools.cli import main as sfa

HTTP = RemoteBlock(allow=["http"], retries=3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Short pauses, no proxy, and a user's cache of the test's own."""
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(remote_index, "USER_CACHE", str(tmp_path / "user cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of random clips with an index beside them."""
    place = tmp_path / "shards"
    place.mkdir()
    for number in range(2):
        samples = [(f"k{number}{n}", os.urandom(20_000), n % 2) for n in range(3)]
        write_shard(place / f"s-{number}.tar", samples)
    build_index(sorted(place.glob("*.tar")))
    return place


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    with file_server(folder) as server:
        yield server


def load(pattern: str, remote: RemoteBlock) -> SampleIndex:
    return load_index(expand_shards([pattern], remote), remote)


def cached(folder: Path, **keys: object) -> RemoteBlock:
    return HTTP.model_copy(update={"cache_dir": str(folder), **keys})


def clips(index: SampleIndex) -> list[bytes]:
    return [read_clip_bytes(index, sample) for sample in range(len(index))]


def local_clips(folder: Path) -> list[bytes]:
    return clips(load_index(sorted(folder.glob("*.tar"))))


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_over(pid: int) -> bool:
    """Gone, or dead and not yet collected by its parent."""
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_http_reads_samples_by_range(folder: Path, server: FileServer) -> None:
    index = load(f"{server.url}/s-{{0..1}}.tar", HTTP)
    server.bytes_sent = 0
    assert clips(index) == local_clips(folder)
    assert server.bytes_sent == 6 * 20_000  # the clips and nothing else
    local = load_index(sorted(folder.glob("*.tar")))
    assert index.sha256 == local.sha256  # a run may go on from a copy elsewhere
    assert index.name(0) == "s-0.tar/k00"


@pytest.mark.fault(47)
@pytest.mark.parametrize("faults", [[503, 500, 429], ["cut", "reset", "cut"], ["reset"] * 3], ids=str)
def test_a_server_that_stumbles_is_asked_again(folder: Path, server: FileServer, faults: list[int | str]) -> None:
    index = load(f"{server.url}/s-0.tar", HTTP)
    server.faults, before = list(faults), server.gets["s-0.tar"]
    assert read_clip_bytes(index, 1) == local_clips(folder)[1]
    assert server.gets["s-0.tar"] - before == len(faults) + 1


@pytest.mark.fault(47)
def test_a_server_that_is_slow_is_waited_for(folder: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfa_dist.data.shards.remote.READ_SECONDS", 0.2)
    from sfa_dist.data.shards.remote import _file_system

    _file_system.cache_clear()
    index = load(f"{server.url}/s-0.tar", HTTP)
    server.faults = [1.0, 1.0]  # longer than it is waited for: asked again, twice
    assert read_clip_bytes(index, 2) == local_clips(folder)[2]
    _file_system.cache_clear()


def test_what_does_not_pass_is_not_asked_again_and_is_one_bad_sample(server: FileServer) -> None:
    index = load(f"{server.url}/s-0.tar", HTTP)
    for status, said in ((404, "not found"), (403, "access denied"), (410, "not found")):
        server.faults, before = [status], server.gets["s-0.tar"]
        with pytest.raises(BadSample) as caught:
            read_clip_bytes(index, 1)
        assert f"{server.url}/s-0.tar cannot be read at offset {index.offset[1]}: {said}" in caught.value.reason
        assert server.gets["s-0.tar"] == before + 1
    server.faults, before = [503] * 9, server.gets["s-0.tar"]
    with pytest.raises(BadSample, match=r"offset \d+: HTTP 503"):
        read_clip_bytes(index, 1)
    assert server.gets["s-0.tar"] == before + 1 + HTTP.retries


def test_a_server_that_is_gone_is_a_bad_sample_at_run_time_and_an_error_at_the_start(folder: Path) -> None:
    with file_server(folder) as server:
        index = load(f"{server.url}/s-0.tar", HTTP)
    with pytest.raises(BadSample, match=r"s-0\.tar cannot be read at offset \d+: .*onnect"):
        read_clip_bytes(index, 0)
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:\d+/index\.json cannot be read: .*onnect"):
        load(f"{server.url}/s-0.tar", HTTP)


def test_a_shard_that_is_gone_or_changed_is_found_before_the_run(folder: Path, server: FileServer) -> None:
    with pytest.raises(DataError, match=r"/s-2\.tar cannot be read: not found"):
        load(f"{server.url}/s-{{0..7}}.tar", HTTP)
    (folder / "s-1.tar").write_bytes((folder / "s-0.tar").read_bytes() + bytes(512))
    with pytest.raises(DataError, match=r"/s-1\.tar has \d+ bytes, its index says \d+"):
        load(f"{server.url}/s-1.tar", HTTP)
    (folder / "s-0.tar").unlink()
    with pytest.raises(DataError, match=r"/s-0\.tar cannot be read: not found"):
        load(f"{server.url}/s-0.tar", HTTP)


def test_a_shard_that_is_cut_or_damaged_on_the_server_is_bad_samples(folder: Path, server: FileServer) -> None:
    index = load(f"{server.url}/s-0.tar", HTTP)
    data = bytearray((folder / "s-0.tar").read_bytes())
    data[index.offset[0]] ^= 1
    (folder / "s-0.tar").write_bytes(data[: index.offset[1] + 100])
    with pytest.raises(BadSample, match=r"crc32 mismatch at offset \d+ of http://.*/s-0\.tar"):
        read_clip_bytes(index, 0)
    with pytest.raises(BadSample, match=f"ends at offset {index.offset[1] + 100}: it was cut"):
        read_clip_bytes(index, 1)
    with pytest.raises(BadSample, match="HTTP 416"):
        read_clip_bytes(index, 2)


def test_without_ranges_whole_shards_are_cached_or_the_start_says_so(folder: Path, tmp_path: Path) -> None:
    with file_server(folder, ranges=False) as server:
        pattern = f"{server.url}/s-{{0..1}}.tar"
        with pytest.raises(DataError, match=r"s-0\.tar: its server sends whole files only.*data\.remote\.cache_dir"):
            load(pattern, HTTP)
        index = load(pattern, cached(tmp_path / "cache"))
        before = server.gets["s-0.tar"]
        server.faults = [0.0, "cut"]
        assert clips(index) == clips(index) == local_clips(folder)
        assert server.gets["s-0.tar"] - before == 1 + 2  # asked how it sends, then cut, then whole


def test_a_pipe_is_a_shard(folder: Path, tmp_path: Path) -> None:
    remote = RemoteBlock(allow=["pipe"], cache_dir=str(tmp_path / "cache"), retries=1)
    index = load(f"pipe:cat {folder}/s-{{0..1}}.tar", remote)
    assert clips(index) == local_clips(folder)
    assert index.name(0) == f"pipe:cat {folder}/s-0.tar/k00"
    shutil.rmtree(folder)
    assert clips(load(f"pipe:cat {folder}/s-{{0..1}}.tar", remote)) == clips(index)  # all of it is kept


def test_a_pipe_that_fails_says_what_it_said(folder: Path, tmp_path: Path) -> None:
    remote = RemoteBlock(allow=["pipe"], cache_dir=str(tmp_path / "cache"), retries=2)
    log = tmp_path / "calls"
    for command, said in (
        (f"echo >> {log}; echo first >&2; echo no such bucket >&2; exit 3", "exit code 3: no such bucket"),
        (f"echo >> {log}; no-such-program", "exit code 127: .*not found"),
        (f"echo >> {log}; head -c 700 {folder}/s-0.tar", "the file ends before|not a plain|was cut"),
    ):
        with pytest.raises(DataError, match=said) as caught:
            load(f"pipe:{command}", remote)
        assert f"pipe:{command}" in str(caught.value)
    assert len(log.read_text()) == 3 + 1 + 1  # only the first may pass by itself
    assert not list((tmp_path / "cache").rglob("*.part"))
    flaky = f"pipe:test -e {tmp_path}/once || {{ touch {tmp_path}/once; exit 1; }}; cat {folder}/s-0.tar"
    assert clips(load(flaky, remote)) == local_clips(folder)[:3]


def test_a_pipe_that_hangs_is_ended(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfa_dist.data.shards.fetch.SILENT_SECONDS", 0.1)
    remote = RemoteBlock(allow=["pipe"], cache_dir=str(tmp_path / "cache"), retries=0)
    pid = tmp_path / "pid"
    with pytest.raises(DataError, match="gave nothing for"):
        load(f"pipe:sleep 60 & echo $! > {pid}; cat {folder}/s-0.tar; wait", remote)
    wait_until(lambda: is_over(int(pid.read_text())))


@pytest.mark.fault(42)
def test_only_what_the_recipe_allows_is_opened(
    folder: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for shard, words in (
        (f"{server.url}/s-0.tar", r"http is off: set data\.remote\.allow: \[http\] if"),
        ("https://127.0.0.1/s-0.tar", r"https is off: set data\.remote\.allow: \[https\] if"),
        (f"pipe:touch {tmp_path}/ran; cat {folder}/s-0.tar", r"allow: \[pipe\] and data\.remote\.cache_dir: FOLDER"),
        ("hf://datasets/a/b.tar", "hf:// is not read, only"),
        ("gs://bucket/b.tar", "gs:// is not read, only"),
        (f"file://{folder}/s-0.tar", "file:// is not read, only"),
    ):
        with pytest.raises(DataError, match=words):
            expand_shards([shard])
    assert not (tmp_path / "ran").exists()
    assert not server.gets
    # webdataset's rewriting of URLs by a variable does not reach us
    monkeypatch.setenv("GOPEN_REWRITE", f"{folder}=pipe:touch {tmp_path}/ran;{server.url}={server.url}/elsewhere")
    monkeypatch.setenv("GOPEN_VERBOSE", "1")
    assert clips(load(f"{server.url}/s-0.tar", HTTP)) == local_clips(folder)[:3]
    assert not (tmp_path / "ran").exists()


def test_names_folders_and_what_is_shown() -> None:
    url = "https://me:secret@host:8/a/b/x.tar?sig=hidden&se=1/2"
    assert (shard_name(url), shard_folder(url)) == ("x.tar", "https://me:secret@host:8/a/b/")
    assert shown(url) == "https://***@host:8/a/b/x.tar?sig=***&se=***"
    pipes = [f"pipe:curl -u me:{secret} https://host/x.tar" for secret in ("abc", "xyz")]
    assert [shard_name(pipe).partition(" #")[0] for pipe in pipes] == ["pipe:curl -u *** https://host/x.tar"] * 2
    assert len({shard_name(pipe) for pipe in pipes}) == 2
    assert (shard_name("pipe:cat a/b"), shard_folder("pipe:cat a/b")) == ("pipe:cat a/b", "pipe:")
    assert (shard_name(Path("/a/b.tar")), shard_folder(Path("/a/b.tar"))) == ("b.tar", Path("/a"))
    with pytest.raises(DataError, match=r"http cannot list files.*braces"):
        expand_shards(["http://host/a-*.tar"], HTTP)
    assert expand_shards(["http://host/a-{1..0}.tar?x=1"], HTTP) == [f"http://host/a-{n}.tar?x=1" for n in (0, 1)]


def test_shards_that_differ_only_in_the_query_are_different_shards(tmp_path: Path) -> None:
    """By the index that is kept here, by one beside them, and by the cache."""
    whole = {part: write_shard(tmp_path / f"{part}.tar", [(f"k{part}", os.urandom(500), 0)]) for part in "12"}
    assert whole["1"].stat().st_size == whole["2"].stat().st_size  # so that no size tells them apart
    server_folder = tmp_path / "server"
    server_folder.mkdir()
    with file_server(server_folder) as server:
        server.by_query = {f"x.tar?part={part}": path.read_bytes() for part, path in whole.items()}
        urls = {part: f"{server.url}/x.tar?part={part}" for part in "12"}
        for remote in (HTTP, cached(tmp_path / "cache")):
            both = load_index([urls["1"], urls["2"]], remote)
            assert list(both.keys) == ["k1", "k2"]
            assert clips(both) == [*local_clip(whole["1"]), *local_clip(whole["2"])]
            for part in "21":
                one = load_index([f"{urls[part]}&X-Amz-Signature=today"], remote)  # who may read does not matter
                assert (list(one.keys), clips(one)) == ([f"k{part}"], local_clip(whole[part]))
        gets = server.gets["x.tar"]
        build_index([whole["1"]])
        beside = (tmp_path / "index.json").read_text().replace("1.tar", "x.tar")
        (server_folder / "index.json").write_text(beside)
        one = load_index([f"{server.url}/x.tar?download=1&part=1"], HTTP)
        assert (list(one.keys), clips(one)) == (["k1"], local_clip(whole["1"]))  # what lies beside it is used
        assert server.gets["x.tar"] == gets + 2  # its size, and the clip
        assert list(load_index([urls["1"], urls["2"]], HTTP).keys) == ["k1", "k2"]  # but not where it is of either
        assert sfa(["index", urls["1"], urls["2"], "--verify"]) == 0
        with pytest.raises(DataError, match=r"2 of the shards of .* are called x\.tar: they differ in who may read"):
            load_index([f"{server.url}/x.tar?sig={sig}" for sig in "ab"], HTTP)


def local_clip(path: Path) -> list[bytes]:
    return clips(load_index([path]))


def test_secrets_of_a_url_are_not_in_messages(server: FileServer) -> None:
    index = load(f"{server.url}/s-0.tar?token=hidden", HTTP)
    for fault in ([404], [503] * 9, ["reset"] * 9):
        server.faults = list(fault)
        with pytest.raises(BadSample) as caught:
            read_clip_bytes(index, 0)
        assert "hidden" not in caught.value.reason
    server.faults = [503] * 9
    with pytest.raises(DataError) as failed:
        load(f"{server.url}/s-0.tar?token=hidden", HTTP)
    assert "hidden" not in str(failed.value)


def test_shards_without_an_index_are_fetched_once_and_their_index_is_kept(
    folder: Path, server: FileServer, tmp_path: Path
) -> None:
    (folder / "index.json").unlink()
    pattern = f"{server.url}/s-{{0..1}}.tar"
    index = load(pattern, HTTP)
    sent = server.bytes_sent
    again = load(pattern, HTTP)
    assert server.bytes_sent - sent == 2  # one byte of each, for its size
    assert (again.sha256, list(again.keys)) == (index.sha256, list(index.keys))
    home = index_home(f"{server.url}/", HTTP)
    assert home.is_relative_to(tmp_path / "user cache")
    assert sorted(path.name for path in home.iterdir()) == ["index.json", "lock"]
    kept = cached(tmp_path / "cache")
    assert clips(load(pattern, kept)) == local_clips(folder)
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 2  # what was fetched to be indexed is in the cache
    with (folder / "s-1.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"s-1\.tar has .* bytes, its index says"):
        load(pattern, HTTP)


def test_an_index_that_knows_only_some_shards(folder: Path, server: FileServer) -> None:
    write_shard(folder / "s-2.tar", [("k20", b"x" * 100, 1)])
    index = load(f"{server.url}/s-{{0..2}}.tar", HTTP)
    assert list(index.keys) == ["k00", "k01", "k02", "k10", "k11", "k12", "k20"]
    assert read_clip_bytes(index, 6) == b"x" * 100
    kept = read_columns(index_home(f"{server.url}/", HTTP))
    assert kept is not None
    assert list(kept.names) == ["s-2.tar"]


def test_class_names_come_from_the_server_too(folder: Path, server: FileServer) -> None:
    (folder / "manifest.json").write_text('{"classes": ["a", "b"]}')
    assert load(f"{server.url}/s-0.tar", HTTP).classes == ["a", "b"]
    (folder / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"http://.*/index\.json is not a readable index"):
        load(f"{server.url}/s-0.tar", HTTP)


def test_index_command_over_http_and_pipes(
    folder: Path, server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, cache = f"{server.url}/s-{{0..1}}.tar", tmp_path / "cache"
    (folder / "index.json").unlink()
    assert sfa(["index", url]) == 0
    home = index_home(f"{server.url}/", HTTP)
    assert (
        f"indexed 6 samples in 2 shards, 0 of them cannot be used\nindex: {home}/index.json\n"
        in capsys.readouterr().out
    )
    assert sfa(["index", url, "--verify"]) == 0
    pipe = f"pipe:cat {folder}/s-0.tar"
    assert sfa(["index", pipe]) == UsageError.exit_code
    assert "--cache-dir" in capsys.readouterr().err
    assert sfa(["index", pipe, "--cache-dir", str(cache)]) == 0
    assert len(load(pipe, RemoteBlock(allow=["pipe"], cache_dir=str(cache)))) == 3
    data = bytearray((folder / "s-1.tar").read_bytes())
    data[load(url, HTTP).offset[3]] ^= 1
    (folder / "s-1.tar").write_bytes(data)
    assert sfa(["index", url, "--verify"]) == DataError.exit_code
    assert f"shard {server.url}/s-1.tar, key 'k10'" in capsys.readouterr().err


def test_loader_workers_read_over_http_as_from_files(tmp_path: Path) -> None:
    """They are forked from a process that has used the network already."""
    paths = write_shards(tmp_path, [4, 3])
    data = DataBlock(resize=28, stride=1, workers=2, decoder="pyav", shuffle_shards=2)
    batch = BatchBlock(size=4, micro=2)

    def batches(index: SampleIndex) -> list[torch.Tensor]:
        loader = train_loader(index, LoaderSettings(data, batch, AugmentBlock(), 4, 24, seed=3), epoch=0)
        return [each.clips for each in loader if not each.bad]

    expected = batches(load_index(paths))
    with file_server(tmp_path) as server:
        for remote in (HTTP, cached(tmp_path / "cache")):
            index = load(f"{server.url}/train-00000{{0..1}}.tar", remote)
            read_clip_bytes(index, 0)
            found = batches(index)
            assert len(found) == len(expected) == 4
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

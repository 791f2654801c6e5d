"""Shards on s3, by a real S3 protocol: moto's server stands in for the service, and everything on our side is real."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_samples import write_shard
from shard_servers import stumbling_proxy

from sfa_dist.data.shards import remote, remote_index, retry
from sfa_dist.data.shards.reader import read_clip_bytes
from sfa_dist.data.shards.shard_index import build_index, load_index
from sfa_dist.data.shards.shard_names import expand_shards
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.errors import DataError
from sfa_dist.recipe.blocks import RemoteBlock
from sfa_dist.tools.cli import main as sfa

S3 = RemoteBlock(retries=2)
BUCKET = "s3://shards"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def account(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Credentials and endpoint where every S3 client looks for them, short pauses, an empty bucket."""
    for key, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(remote_index, "USER_CACHE", str(tmp_path / "user cache"))
    remote._file_system.cache_clear()
    files().mkdir("shards")
    yield
    files().rm("shards", recursive=True)
    remote._file_system.cache_clear()


def files():
    return remote._files(BUCKET, S3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards, here and in the bucket under train/, with their index."""
    place = tmp_path / "local"
    place.mkdir()
    for number in range(3):
        write_shard(place / f"t-{number}.tar", [(f"k{number}{n}", os.urandom(9_000), n) for n in range(2)])
    build_index(sorted(place.glob("*.tar")))
    for path in place.iterdir():
        files().pipe_file(f"{BUCKET}/train/{path.name}", path.read_bytes())
    return place


def load(pattern: str, block: RemoteBlock = S3):
    return load_index(expand_shards([pattern], block), block)


def same_as_local(index, folder: Path) -> bool:
    local = load_index(sorted(folder.glob("*.tar")))
    clips = [[read_clip_bytes(each, sample) for sample in range(len(each))] for each in (index, local)]
    return index.sha256 == local.sha256 and clips[0] == clips[1]


def test_globs_and_braces_find_shards_and_samples_come_by_range(folder: Path, tmp_path: Path) -> None:
    assert expand_shards([f"{BUCKET}/train/t-*.tar"]) == [f"{BUCKET}/train/t-{n}.tar" for n in range(3)]
    for pattern in ("t-*.tar", "t-{0..2}.tar", "t-[012].tar", "t-?.tar"):
        assert same_as_local(load(f"{BUCKET}/train/{pattern}"), folder), pattern
    assert same_as_local(
        load(f"{BUCKET}/train/*.tar", S3.model_copy(update={"cache_dir": str(tmp_path / "c")})), folder
    )
    assert len(list((tmp_path / "c" / "shards").iterdir())) == 3
    with pytest.raises(DataError, match=r"no shard matches 's3://shards/train/x-\*\.tar'"):
        expand_shards([f"{BUCKET}/train/x-*.tar"])


def test_what_is_not_there_or_not_allowed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"s3://shards/train/t-9\.tar cannot be read: not found"):
        load(f"{BUCKET}/train/t-9.tar")
    with pytest.raises(DataError, match=r"s3://nothing/t-9\.tar cannot be read: not found"):
        load("s3://nothing/t-9.tar")
    index = load(f"{BUCKET}/train/t-0.tar")
    files().rm_file(f"{BUCKET}/train/t-0.tar")
    with pytest.raises(BadSample, match=r"s3://shards/train/t-0\.tar cannot be read at offset \d+: not found"):
        read_clip_bytes(index, 0)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    remote._file_system.cache_clear()
    with pytest.raises(DataError, match=r"s3://shards/train/.*redentials"):
        load(f"{BUCKET}/train/t-1.tar")
    remote._file_system.cache_clear()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")


def test_a_service_that_stumbles_is_asked_again(
    folder: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A proxy in front of the service answers 503 and cuts connections."""
    with stumbling_proxy(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        remote._file_system.cache_clear()
        index = load(f"{BUCKET}/train/t-0.tar")
        proxy.faults = [503, "cut"]
        clip = read_clip_bytes(index, 1)
        assert proxy.faults == []
        proxy.faults = [503] * 9
        with pytest.raises(BadSample, match=r"t-0\.tar cannot be read at offset \d+: "):
            read_clip_bytes(index, 1)
        assert len(proxy.faults) == 9 - (1 + S3.retries)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    remote._file_system.cache_clear()
    assert clip == read_clip_bytes(load_index([folder / "t-0.tar"]), 1)


def test_index_command_writes_beside_the_shards(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files().rm_file(f"{BUCKET}/train/index.json")
    assert sfa(["index", f"{BUCKET}/train/t-*.tar"]) == 0
    assert f"index: {BUCKET}/train/index.json" in capsys.readouterr().out
    written = json.loads(files().cat_file(f"{BUCKET}/train/index.json"))
    assert written == json.loads((folder / "index.json").read_bytes())
    assert sfa(["index", f"{BUCKET}/train/t-*.tar", "--verify"]) == 0
    write_shard(folder / "t-1.tar", [("other", b"x" * 9, 0)])
    files().pipe_file(f"{BUCKET}/train/t-1.tar", (folder / "t-1.tar").read_bytes())
    assert sfa(["index", f"{BUCKET}/train/t-*.tar", "--verify"]) == DataError.exit_code
    assert sfa(["index", f"{BUCKET}/train/t-1.tar"]) == 0  # the others' entries stay
    build_index([folder / "t-1.tar"])
    assert same_as_local(load(f"{BUCKET}/train/t-*.tar"), folder)

"""Servers and commands that send other bytes than they were asked for, more of them, or none: errors within bounds."""

from __future__ import annotations

import gzip
import io
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from data_samples import write_shard
from impatient import HTTP, quick
from shard_servers import Script, Send, file_server, serving

from sfa_dist.data.shards import answers, fetch, remote, remote_index
from sfa_dist.data.shards.answers import parse_content_range
from sfa_dist.data.shards.fetch import fetch_shard
from sfa_dist.data.shards.index_file import format_index
from sfa_dist.data.shards.reader import read_clip_bytes
from sfa_dist.data.shards.remote import Answer, NoRangesError, look, read_range, read_whole
from sfa_dist.data.shards.shard_index import build_index, load_index
from sfa_dist.errors import DataError
from sfa_dist.recipe.blocks import RemoteBlock

__all__ = ["quick"]
MIB = 1 << 20


def says(status: str, body: Iterable[bytes] = (), **headers: object) -> Script:
    """Always the same answer."""

    def script(_: bytes, send: Send) -> None:
        lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
        send("\r\n".join([*lines, "Connection: close", "", ""]).encode())
        for data in body:
            send(data)

    return script


def endless() -> Iterator[bytes]:
    for _ in range(3000):
        yield bytes(MIB)


def grown(work: Callable[[], object]) -> int:
    """MiB by which the resident peak grew."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


def refused(work: Callable[[], object], words: str, kind: type[Exception] = OSError) -> None:
    with pytest.raises(kind, match=words or None) as caught:
        work()
    assert "\n" not in str(caught.value)


PARTIAL = "206 Partial Content"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (says(PARTIAL, endless(), Content_Range="bytes 10-19/1000"), "more than the 10 bytes that were asked for"),
        (says(PARTIAL, [b"x" * 10]), "does not say which bytes it sends"),
        (says(PARTIAL, [b"x" * 10], Content_Range="bytes 0-9/1000"), "sends bytes 0 to 9 for 10 to 19"),
        (says(PARTIAL, [b"x" * 10], Content_Range="bytes 10-90/1000"), "sends bytes 10 to 90"),
        (says(PARTIAL, [b"x" * 10], Content_Range="bytes 10-19/5"), "does not say which"),
        (says(PARTIAL, [b"x" * 10], Content_Range="bytes 10-19/" + "9" * 5000), "does not say which"),
        (says(PARTIAL, [b"x" * 4], Content_Range="bytes 10-19/1000"), "4 bytes came instead of 10"),
        (says(PARTIAL, [b"x" * 4], Content_Range="bytes 10-13/1000"), "4 bytes came instead of 10"),
        (says(PARTIAL, [], Content_Range="bytes 10-19/1000"), "0 bytes came"),
        (says(PARTIAL, [b"x" * 4], Content_Range="bytes 10-19/1000", Content_Length=10), "Payload"),
        (says(PARTIAL, [b"x" * 4], Content_Range="bytes 10-19/1000", Content_Length=-10), "Content-Length"),
        (says(PARTIAL, [b"x" * 4], Content_Range="bytes 10-19/1000", Content_Length=4), "4 bytes came"),
        (says(PARTIAL, [b"x" * 10], Content_Range="bytes 10-19/1000", Content_Type="text/html"), "a web page"),
        (says("200 OK", [b"<html>"], Content_Type="text/html; charset=utf-8"), "a web page"),
        (says("200 OK", endless()), "no byte ranges"),
        (says("204 No Content"), "HTTP 204 in place of a range"),
        (says("304 Not Modified"), "HTTP 304 in place of a range"),
        (says("206 x", endless(), Content_Range="bytes 10-19/1000", Transfer_Encoding="chunked"), ""),
        (says("302 Found", Location="file:///etc/passwd"), "redirects from http to 'file'"),
        (says("302 Found", Location="ftp://host/x"), "redirects from http to 'ftp'"),
        (says("302 Found", Location="/d/x.tar"), "redirects more than 5 times"),
        (says("302 Found", Location="http://["), ""),
        (says("302 Found"), "HTTP 302 in place of a range"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)  # fmt: skip
def test_a_range_is_what_was_asked_for_or_an_error(script: Script, words: str) -> None:
    with serving(script) as url:
        assert grown(lambda: refused(lambda: read_range(url, 10, 10, HTTP), words)) < 50


def test_compressed_answers_are_refused_and_not_unpacked() -> None:
    bomb = gzip.compress(bytes(200 * MIB), 1)
    for encoding in ("gzip", "deflate", "br"):
        ranged = says(PARTIAL, [bomb], Content_Range=f"bytes 0-{len(bomb) - 1}/*", Content_Encoding=encoding)
        with serving(ranged) as url:
            assert grown(lambda at=url: refused(lambda: read_range(at, 0, len(bomb), HTTP), "compressed")) < 50
        with serving(says("200 OK", [bomb], Content_Encoding=encoding)) as url:
            index = url.replace("x.tar", "index.json")
            assert grown(lambda at=index: refused(lambda: read_whole(at, HTTP), "compressed")) < 50


def test_an_endless_index_is_an_error_and_not_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(answers.LARGEST_FILE, "index.json", 200 * MIB)
    with serving(says("200 OK", endless())) as url:
        assert grown(lambda: refused(lambda: load_index([url], HTTP), "more than the 209715200 bytes", DataError)) < 60
    with serving(says("200 OK", endless(), Content_Length=3000 * MIB)) as url:
        refused(lambda: load_index([url], HTTP), "3145728000 bytes are more than", DataError)


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b"[" * 100_000, b"null"])
def test_an_index_that_is_none_is_an_error(body: bytes) -> None:
    with serving(says("200 OK", [body])) as url:
        refused(lambda: load_index([url], HTTP), r"/d/index\.json is not a readable index", DataError)


def drip(head: bytes, every: float = 0.02) -> Script:
    def script(_: bytes, send: Send) -> None:
        send(head)
        while True:
            send(b"x")
            time.sleep(every)

    return script


def test_what_comes_too_slowly_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes long before a silent server would be given up."""
    monkeypatch.setattr(remote, "READ_SECONDS", 0.3)
    monkeypatch.setattr(remote, "CONNECT_SECONDS", 0.1)
    for head in (
        b"HTTP/1.1 206 x\r\nContent-Range: bytes 0-9999/10000\r\n\r\n",
        b"HTTP/1.1 206 x\r\nX: ",
        b"HTTP/1.1 206 ",
    ):
        with serving(drip(head)) as url:
            begin = time.monotonic()
            refused(lambda at=url: read_range(at, 0, 10_000, HTTP), "no answer in time")
            assert time.monotonic() - begin < 5
    with serving(drip(b"HTTP/1.1 200 OK\r\n\r\n")) as url:
        refused(lambda: read_whole(url.replace("x.tar", "index.json"), HTTP), "no answer in time")
        refused(lambda: fetch_shard(url, io.BytesIO(), HTTP), "no answer in time|no byte ranges")


def test_headers_without_end_are_an_error() -> None:
    def script(_: bytes, send: Send) -> None:
        send(b"HTTP/1.1 206 x\r\n")
        for number in range(1_000_000):
            send(b"X-%d: %b\r\n" % (number, b"y" * 4000))

    with serving(script) as url:
        assert grown(lambda: refused(lambda: look(url, HTTP), "")) < 100


def test_cookies_are_not_collected() -> None:
    script = says(PARTIAL, [b"x"], Content_Range="bytes 0-0/10", Set_Cookie="a=b; Max-Age=9999", Content_Length=1)
    with serving(script) as url:
        assert look(url, HTTP) == Answer(10, True)
        files = remote._files(url, HTTP)
        assert len(files._session.cookie_jar) == 0


def test_a_redirect_to_another_server_is_followed(tmp_path: Path) -> None:
    (tmp_path / "y.tar").write_bytes(b"0123456789")
    with file_server(tmp_path) as server, serving(says("302 Found", Location=f"{server.url}/y.tar")) as url:
        assert read_range(url, 2, 3, HTTP) == b"234"


def test_one_connection_serves_many_ranges(tmp_path: Path) -> None:
    (tmp_path / "y.tar").write_bytes(b"0123456789")
    with file_server(tmp_path) as server:
        assert [read_range(f"{server.url}/y.tar", start, 2, HTTP) for start in (0, 4, 8)] == [b"01", b"45", b"89"]
        assert len(server._connections) == 1


def shard_bytes(tmp_path: Path) -> bytes:
    return write_shard(tmp_path / "s.tar", [(f"k{n}", bytes([n]) * 20_000, 0) for n in range(5)]).read_bytes()


@pytest.mark.parametrize("name", ["ETag", "Last-Modified"])
def test_a_shard_that_is_replaced_while_it_is_fetched_is_an_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "CHUNK", 10_000)
    data, seen = shard_bytes(tmp_path), []

    def script(asked: bytes, send: Send) -> None:
        first, last = map(int, asked.split(b"bytes=")[1].split(b"\r\n")[0].split(b"-"))
        part = data[first : last + 1]
        seen.append(first)
        mark = '"old"' if len(seen) < 4 else '"new"'
        head = (
            f"HTTP/1.1 206 x\r\nContent-Range: bytes {first}-{first + len(part) - 1}/{len(data)}\r\n{name}: {mark}\r\n"
        )
        send(f"{head}Content-Length: {len(part)}\r\nConnection: close\r\n\r\n".encode() + part)

    with serving(script) as url, (tmp_path / "copy").open("w+b") as file:
        refused(lambda: fetch_shard(url, file, HTTP), "it was replaced while it was read")
        seen.clear()
        monkeypatch.setattr(fetch, "CHUNK", 1 << 20)
        fetch_shard(url, file, HTTP)
        file.seek(0)
        assert file.read() == data


def test_a_shard_has_the_size_of_its_index_or_is_not_taken(tmp_path: Path) -> None:
    data = shard_bytes(tmp_path)
    longer = data + bytes(50 * MIB)
    cache = str(tmp_path / "cache")
    for script in (says("200 OK", [longer]), says("200 OK", [data, *endless()])):
        with serving(script) as url, (tmp_path / "copy").open("w+b") as file:
            refused(lambda at=url, to=file: fetch_shard(at, to, HTTP, len(data)), "more than")
            file.flush()
            assert (tmp_path / "copy").stat().st_size <= len(data)
    remote_block = RemoteBlock(allow=["pipe"], retries=0, cache_dir=cache)
    with (tmp_path / "copy").open("w+b") as file:
        for command in (f"cat {tmp_path}/s.tar /dev/zero", "yes", "cat /dev/zero", "echo '<html>' $(seq 1000)"):
            begin = time.monotonic()
            refused(
                lambda to=file, what=command: fetch_shard(f"pipe:{what}", to, remote_block, len(data)),
                "more than|not a plain, complete tar",
            )
            assert time.monotonic() - begin < 10
    with pytest.raises(DataError, match=r"not a plain, complete tar .*: it begins with b'y\\ny"):
        load_index(["pipe:yes"], remote_block)


def test_a_command_that_drips_or_only_complains_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "SILENT_SECONDS", 0.3)
    block = RemoteBlock(allow=["pipe"], retries=0, cache_dir=str(tmp_path))
    shard_bytes(tmp_path)
    for command in (f"while head -c 1 {tmp_path}/s.tar; do sleep 0.05; done", "yes >&2"):
        with (tmp_path / "copy").open("w+b") as file:
            begin = time.monotonic()
            assert grown(lambda to=file, what=command: refused(lambda: fetch_shard(f"pipe:{what}", to, block), "")) < 50
            assert time.monotonic() - begin < 5


def test_a_hash_of_an_index_names_no_file_elsewhere(tmp_path: Path) -> None:
    """An index comes from a server, and the cache names files by its hashes."""
    path = write_shard(tmp_path / "x.tar", [("k", b"clip", 0)])
    build_index([path])
    entry = {**remote_index.read_raw(tmp_path)["x.tar"], "sha256": "../../../evil"}
    (tmp_path / "index.json").write_bytes(format_index({"x.tar": entry}))
    block = HTTP.model_copy(update={"cache_dir": str(tmp_path / "a" / "cache")})
    with file_server(tmp_path) as server, pytest.raises(DataError, match=r"'\.\./\.\./\.\./evil' is not a sha256"):
        read_clip_bytes(load_index([f"{server.url}/x.tar"], block), 0)


def test_content_ranges() -> None:
    assert parse_content_range("bytes 0-0/51200") == (0, 0, 51200)
    assert parse_content_range("bytes 5-9/*") == (5, 9, None)
    for text in ("", "bytes */5", "bytes 5-4/10", "bytes 0-10/10", "items 0-1/2", "bytes ١-٢/٣", "bytes 0-1/2, 3-4/5"):
        with pytest.raises(OSError, match="does not say which bytes"):
            parse_content_range(text)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (says(PARTIAL, endless(), Content_Range="bytes 10-19/1000"), "more than the 10 bytes that were asked for"),
        (says(PARTIAL, [b"x" * 10], Content_Range="bytes 0-9/1000", Content_Length=10), "sends bytes 0 to 9 for 10"),
        (says(PARTIAL, [b"x" * 10], Content_Length=10), "does not say which bytes"),
        (says("200 OK", endless()), "no byte ranges"),
        (says(PARTIAL, [gzip.compress(b"x")], Content_Range="bytes 10-19/1000", Content_Encoding="gzip"), "compressed"),
        (drip(b"HTTP/1.1 206 x\r\nContent-Range: bytes 10-19999/20000\r\n\r\n"), "no answer in time|sends bytes 10 to"),
        (drip(b"HTTP/1.1 206 x\r\nX: "), "no answer in time"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)  # fmt: skip
def test_s3_is_bounded_as_http_is(script: Script, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "READ_SECONDS", 2.0)
    monkeypatch.setattr(remote, "CONNECT_SECONDS", 2.0)
    with serving(script) as url:
        for key, value in {
            "AWS_ENDPOINT_URL": url.rpartition("/d/")[0],
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(key, value)
        block = RemoteBlock(retries=0)
        assert grown(lambda: refused(lambda: read_range("s3://bucket/x.tar", 10, 10, block), words)) < 80


def test_no_ranges_tell_the_size() -> None:
    with serving(says("200 OK", [b"x" * 7], Content_Length=7)) as url:
        assert look(url, HTTP) == Answer(7, False)
        with pytest.raises(NoRangesError):
            read_range(url, 0, 3, HTTP)

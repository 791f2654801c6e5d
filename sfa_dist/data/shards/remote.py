"""Bytes from s3 and http(s), by fsspec: ranges, whole files and listings. Every failure is raised as an OSError.

Each answer is checked (answers.py): it has the requested bytes and no more, uncompressed, and is not slower than
SLOWEST. This module does not retry; its callers use `retry.with_retries`. Connections belong to one process: a forked
loader worker opens its own.
"""

from __future__ import annotations

import asyncio
import errno
import io
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from sfa_dist.data.shards.answers import LARGEST_FILE, Sink, parse_content_range, take, wrong_answer
from sfa_dist.errors import RecipeError
from sfa_dist.recipe.blocks import RemoteBlock, shard_kind

CONNECT_SECONDS, READ_SECONDS = 20, 60  # a server that is silent for longer is asked again
LIST_SECONDS = 600
REDIRECTS = 5
IN_MEMORY = 16 << 20  # bytes of a whole file; a larger one goes to disk
# Parts of the names of network libraries' errors that a retry does not cure.
_FINAL = (
    "NoCredentials",
    "PartialCredentials",
    "InvalidURL",
    "ParamValidation",
    "Certificate",
    "SSL",
    "ProfileNotFound",
)


class NoRangesError(OSError):
    """The server sends whole files only; `size` is the reported size of this one in bytes, or None."""

    def __init__(self, size: int | None) -> None:
        super().__init__(errno.ESPIPE, "the server sends no byte ranges")
        self.size = size


class Answer(NamedTuple):
    """A server's answer about a file.

    Its size in bytes (None: not reported), whether the server sends byte ranges, and a mark that changes with the
    file's content ("": none).
    """

    size: int | None
    ranges: bool
    mark: str = ""


class _Reply(NamedTuple):
    """An HTTP or s3 answer whose body has not been read. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    read: Callable[[int], Awaitable[bytes]]

    @property
    def length(self) -> int | None:
        text = self.headers.get("content-length", "")
        return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None

    @property
    def mark(self) -> str:
        return self.headers.get("etag") or self.headers.get("last-modified", "")


def read_range(url: str, start: int, size: int, remote: RemoteBlock, of: Answer | None = None) -> bytes:
    """`size` bytes from `start` on, fewer if the file ends before; `of` is an earlier answer about the file.

    Raises NoRangesError and other OSErrors, also if the file has changed since `of`.
    """
    data = io.BytesIO()
    with _as_oserror():
        found = _run(_files(url, remote), _take_range, url, start, size, data)
    if of is not None and (found.size, found.mark) != (of.size, of.mark):
        raise wrong_answer("it was replaced while it was read: run the same command again")
    return data.getvalue()


def read_whole(url: str, remote: RemoteBlock) -> bytes:
    """All bytes of a small file whose name LARGEST_FILE lists. Raises OSError."""
    limit = LARGEST_FILE[url.rpartition("/")[2]]
    with _as_oserror(), tempfile.SpooledTemporaryFile(IN_MEMORY) as data:
        _run(_files(url, remote), _take_whole, url, data, limit)
        data.seek(0)
        return data.read()


def look(url: str, remote: RemoteBlock) -> Answer:
    """The size of a file and how it can be read. Raises FileNotFoundError and other OSErrors."""
    with _as_oserror():
        try:
            return _run(_files(url, remote), _take_range, url, 0, 1, io.BytesIO())
        except NoRangesError as error:
            return Answer(error.size, False)


def copy_stream(url: str, sink: Sink, limit: int, remote: RemoteBlock) -> None:
    """Copies a whole file of at most `limit` bytes in one stream, for servers without ranges. Raises OSError."""
    with _as_oserror():
        _run(_files(url, remote), _take_whole, url, sink, limit)


def list_s3(pattern: str, remote: RemoteBlock) -> list[str]:
    """The URLs of the files on s3 that match a glob. Raises OSError."""
    with _as_oserror():
        return [f"s3://{name}" for name in _run(_files(pattern, remote), _glob, pattern)]


def write_s3(url: str, data: bytes, remote: RemoteBlock) -> None:
    """Writes one object, as a whole or not at all. Raises OSError."""
    with _as_oserror():
        _files(url, remote).pipe_file(url, data)


def _files(url: str, remote: RemoteBlock) -> Any:
    return _file_system(shard_kind(url), remote.anonymous, os.getpid())


@lru_cache(maxsize=8)
def _file_system(kind: str, anonymous: bool, _process: int) -> Any:
    """One fsspec file system for each process: they do not survive a fork."""
    try:
        import aiohttp
        import fsspec

        if kind == "s3":
            config = {
                "connect_timeout": CONNECT_SECONDS,
                "read_timeout": READ_SECONDS,
                "retries": {"max_attempts": 0},
            }
            files = fsspec.filesystem(
                "s3", anon=anonymous, config_kwargs=config, use_listings_cache=False, skip_instance_cache=True
            )
            files.retries = 1
            return files
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        client: dict[str, Any] = {
            "timeout": timeout,
            "trust_env": True,
            "headers": {"Accept-Encoding": "identity"},
            "auto_decompress": False,
        }
        return fsspec.filesystem(kind, client_kwargs=client, skip_instance_cache=True)
    except ImportError as error:
        raise RecipeError(
            f"{kind}:// shards need packages that are not installed ({error}): pip install 'sfa_dist[remote]'"
        ) from error


def _run(files: Any, work: Callable[..., Any], *arguments: Any) -> Any:
    from fsspec.asyn import sync

    return sync(files.loop, work, files, *arguments)


async def _take_range(files: Any, url: str, start: int, size: int, sink: Sink) -> Answer:
    """Writes a range of a file into `sink`. Raises NoRangesError and other OSErrors."""
    async with _reply(files, url, f"bytes={start}-{start + size - 1}") as reply:
        if reply.status == 200:  # the rest of the file is not wanted
            raise NoRangesError(reply.length)
        if reply.status != 206:
            raise wrong_answer(f"HTTP {reply.status} in place of a range")
        sent = parse_content_range(reply.headers.get("content-range", ""))
        if sent.first != start or sent.last >= start + size:
            raise wrong_answer(f"the server sends bytes {sent.first} to {sent.last} for {start} to {start + size - 1}")
        wanted = sent.last + 1 - start
        taken = await take(reply.read, sink, wanted, READ_SECONDS)
        if taken != wanted or (taken < size and sent.size not in (None, start + taken)):
            raise OSError(errno.EIO, f"{taken} bytes came instead of {size}")
        return Answer(sent.size, True, reply.mark)


async def _take_whole(files: Any, url: str, sink: Sink, limit: int) -> None:
    async with _reply(files, url, None) as reply:
        if reply.status != 200:
            raise wrong_answer(f"HTTP {reply.status} in place of a file")
        if reply.length is not None and reply.length > limit:
            raise wrong_answer(f"{reply.length} bytes are more than the {limit} that such a file may have")
        taken = await take(reply.read, sink, limit, READ_SECONDS)
        if reply.length not in (None, taken):
            raise OSError(errno.EIO, f"{taken} bytes came instead of {reply.length}")


@asynccontextmanager
async def _reply(files: Any, url: str, wanted: str | None) -> AsyncIterator[_Reply]:
    """The answer to a request for a range or a whole file. Raises the library's error for a status of 400 or more."""
    is_s3 = shard_kind(url) == "s3"
    async with asyncio.timeout(CONNECT_SECONDS + READ_SECONDS):
        opened = await (_ask_s3 if is_s3 else _ask_http)(files, url, wanted)
    body, reply = opened
    try:
        if (encoding := reply.headers.get("content-encoding", "identity").lower()) not in ("", "identity"):
            raise wrong_answer(f"it is sent compressed ({encoding[:20]}), though it was requested uncompressed")
        if reply.headers.get("content-type", "").lower().startswith("text/html"):
            raise wrong_answer("a web page (text/html) came in place of the file")
        yield reply
    finally:
        body.close()  # a connection with unread data is not reused


async def _ask_http(files: Any, url: str, wanted: str | None) -> tuple[Any, _Reply]:
    session = await files.set_session()
    address = files.encode_url(url)
    for _ in range(REDIRECTS + 1):
        headers = {} if wanted is None else {"Range": wanted}
        response = await session.get(address, headers=headers, allow_redirects=False)
        session.cookie_jar.clear()  # cookies are not kept
        target = response.headers.get("Location")
        if response.status not in (301, 302, 303, 307, 308) or target is None:
            try:
                response.raise_for_status()
            except BaseException:
                response.close()
                raise
            fields = {name.lower(): value for name, value in response.headers.items()}
            return response, _Reply(response.status, fields, response.content.read)
        response.close()
        address = _redirected(address, target)
    raise wrong_answer(f"the server redirects more than {REDIRECTS} times")


def _redirected(address: Any, target: str) -> Any:
    """The target of a redirect: on any host, because of mirrors, but http(s) only, and never from https to http."""
    import yarl

    new = address.join(yarl.URL(target))
    if new.scheme not in ("https", address.scheme) or not new.host:
        raise wrong_answer(f"the server redirects from {address.scheme} to {new.scheme[:20]!r}, which is not followed")
    return new


async def _ask_s3(files: Any, url: str, wanted: str | None) -> tuple[Any, _Reply]:
    bucket, key, version = files.split_path(url)
    more = {name: value for name, value in (("VersionId", version), ("Range", wanted)) if value}
    found = await files._call_s3("get_object", Bucket=bucket, Key=key, **more)
    about = found["ResponseMetadata"]
    fields = {name.lower(): str(value) for name, value in about["HTTPHeaders"].items()}
    return found["Body"], _Reply(int(about["HTTPStatusCode"]), fields, found["Body"].read)


async def _glob(files: Any, pattern: str) -> Any:
    async with asyncio.timeout(LIST_SECONDS):
        return await files._glob(pattern)


@contextmanager
def _as_oserror() -> Iterator[None]:
    """Raises errors of aiohttp, botocore and asyncio as OSErrors, as from a disk, so that callers treat all alike."""
    try:
        yield
    except Exception as error:
        if isinstance(error, NoRangesError | RecipeError):
            raise
        raise _oserror(error) from error


def _oserror(error: Exception) -> OSError:
    name, text = type(error).__name__, " ".join(str(error).split()) or type(error).__name__
    status = _http_status(error)
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "not found (HTTP 404)")
    if status in (401, 403) or isinstance(error, PermissionError):
        return PermissionError(errno.EACCES, f"access denied (HTTP {status or 403})")
    if status is not None:
        transient = status >= 500 or status in (408, 425, 429)
        # aiohttp's text would contain the URL with its query; its message does not.
        text = " ".join(str(getattr(error, "message", text)).split())[:200]
        return OSError(errno.EIO if transient else errno.EINVAL, f"HTTP {status}: {text}")
    if isinstance(error, TimeoutError):
        return TimeoutError(errno.ETIMEDOUT, f"no answer in time ({name})")
    if any(part in name for part in _FINAL):
        return OSError(errno.EINVAL, text)
    if type(error).__module__.partition(".")[0] in ("aiohttp", "botocore", "aiobotocore", "urllib3"):
        return OSError(errno.EIO, f"{name}: {text}")
    if isinstance(error, OSError):
        return error
    return OSError(errno.EINVAL, f"{name}: {text}")


def _http_status(error: BaseException) -> int | None:
    """The HTTP status behind an error of aiohttp, or of botocore even if s3fs has translated the error."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status
    for each in (error, error.__cause__):
        answer = getattr(each, "response", None)
        if isinstance(answer, dict):
            found = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return int(found) if found else None
    return None

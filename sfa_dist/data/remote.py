"""Bytes from s3 and http(s), by fsspec: ranges, whole files, sizes, listings. Every failure comes out as an OSError.

This layer does not try again: `retry.with_retries` does, around it. Connections belong to one process: a forked loader
worker opens its own.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

from sfa_dist.errors import RecipeError
from sfa_dist.recipe_blocks import RemoteBlock, shard_kind

CONNECT_SECONDS, READ_SECONDS = 20, 60  # a server that says nothing for so long is asked again
# What of a network library's own errors will not pass by waiting.
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
    """The server sends whole files only; `size` is what it says of this one, in bytes, or None."""

    def __init__(self, size: int | None) -> None:
        super().__init__(errno.ESPIPE, "the server sends no byte ranges")
        self.size = size


class Answer(NamedTuple):
    """What a server says of a file: its size in bytes (None: not told) and whether it sends byte ranges."""

    size: int | None
    ranges: bool


def read_range(url: str, start: int, size: int, remote: RemoteBlock) -> bytes:
    """`size` bytes from `start` on, fewer where the file ends. Raises NoRangesError and other OSErrors."""
    files = _files(url, remote)
    with _as_oserror():
        if shard_kind(url) == "s3":
            return bytes(files.cat_file(url, start=start, end=start + size))
        data: bytes = _sync(files, _http_get, url, start, start + size)[0]
        return data


def read_whole(url: str, remote: RemoteBlock) -> bytes:
    """All bytes of a small file. Raises OSError."""
    with _as_oserror():
        return bytes(_files(url, remote).cat_file(url))


def look(url: str, remote: RemoteBlock) -> Answer:
    """Size of a file and how it can be read. Raises FileNotFoundError and other OSErrors."""
    files = _files(url, remote)
    with _as_oserror():
        if shard_kind(url) == "s3":
            return Answer(int(files.info(url)["size"]), True)
        try:
            headers = _sync(files, _http_get, url, 0, 1)[1]
        except NoRangesError as error:
            return Answer(error.size, False)
        total = headers.get("Content-Range", "").rpartition("/")[2]
        return Answer(int(total) if total.isdecimal() else None, True)


def copy_stream(url: str, file: BinaryIO, remote: RemoteBlock) -> None:
    """A whole file in one stream into `file`, for servers without ranges. Raises OSError."""
    with _as_oserror():
        _files(url, remote).get_file(url, file)


def list_s3(pattern: str, remote: RemoteBlock) -> list[str]:
    """URLs of the files on s3 that match a glob. Raises OSError."""
    with _as_oserror():
        return [f"s3://{name}" for name in _files(pattern, remote).glob(pattern)]


def write_s3(url: str, data: bytes, remote: RemoteBlock) -> None:
    """Writes one object, as a whole or not at all. Raises OSError."""
    with _as_oserror():
        _files(url, remote).pipe_file(url, data)


def _files(url: str, remote: RemoteBlock) -> Any:
    return _file_system(shard_kind(url), remote.anonymous, os.getpid())


@lru_cache(maxsize=8)
def _file_system(kind: str, anonymous: bool, _process: int) -> Any:
    """One fsspec file system a process: they do not survive a fork."""
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
        client: dict[str, Any] = {"timeout": timeout, "trust_env": True, "headers": {"Accept-Encoding": "identity"}}
        return fsspec.filesystem(kind, client_kwargs=client, skip_instance_cache=True)
    except ImportError as error:
        raise RecipeError(
            f"{kind}:// shards need packages that are not installed ({error}): pip install 'sfa_dist[remote]'"
        ) from error


def _sync(files: Any, work: Callable[..., Any], *arguments: Any) -> Any:
    from fsspec.asyn import sync

    return sync(files.loop, work, files, *arguments)


async def _http_get(files: Any, url: str, start: int, end: int) -> tuple[bytes, Any]:
    """(bytes, headers) of a range. Raises NoRangesError."""
    session = await files.set_session()
    async with session.get(files.encode_url(url), headers={"Range": f"bytes={start}-{end - 1}"}) as response:
        response.raise_for_status()
        if response.status != 206:
            response.close()  # the rest of the file is not wanted
            raise NoRangesError(response.content_length)
        return await response.read(), response.headers


@contextmanager
def _as_oserror() -> Iterator[None]:
    """Errors of aiohttp, botocore and asyncio as the OSError that a disk would give, so that one rule judges them."""
    try:
        yield
    except Exception as error:
        if isinstance(error, NoRangesError | RecipeError):
            raise
        raise _oserror(error) from error


def _oserror(error: Exception) -> OSError:
    name, said = type(error).__name__, " ".join(str(error).split()) or type(error).__name__
    status = _http_status(error)
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "not found (HTTP 404)")
    if status in (401, 403) or isinstance(error, PermissionError):
        return PermissionError(errno.EACCES, f"access denied (HTTP {status or 403})")
    if status is not None:
        passing = status >= 500 or status in (408, 425, 429)
        said = getattr(error, "message", said)  # of aiohttp: its text bears the URL, query and all
        return OSError(errno.EIO if passing else errno.EINVAL, f"HTTP {status}: {said}")
    if isinstance(error, TimeoutError):
        return TimeoutError(errno.ETIMEDOUT, f"no answer in time ({name})")
    if any(part in name for part in _FINAL):
        return OSError(errno.EINVAL, said)
    if type(error).__module__.partition(".")[0] in ("aiohttp", "botocore", "aiobotocore", "urllib3"):
        return OSError(errno.EIO, f"{name}: {said}")
    if isinstance(error, OSError):
        return error
    return OSError(errno.EINVAL, f"{name}: {said}")


def _http_status(error: BaseException) -> int | None:
    """The status of the answer behind an error of aiohttp or, also where s3fs has translated it, of botocore."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status
    for each in (error, error.__cause__):
        answer = getattr(each, "response", None)
        if isinstance(answer, dict):
            found = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return int(found) if found else None
    return None

"""Expands the patterns of a recipe into one sorted list of shards, the same on every rank.

A shard is a local file (a Path) or a string: `s3://...`, `http(s)://...`, `pipe:COMMAND`. Environment variables do not
change them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from glob import iglob
from itertools import islice
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from sfa_dist.boundary.secret import MASK, is_masked, remember_source, shown_source
from sfa_dist.data.shards.braces import MAX_NAMES, expand_braces
from sfa_dist.data.shards.remote import list_s3
from sfa_dist.data.shards.retry import with_retries
from sfa_dist.errors import DataError, RecipeError
from sfa_dist.recipe.blocks import RemoteBlock, shard_kind

Shard = Path | str
PIPE = "pipe:"
LOCAL_ONLY = RemoteBlock()
# Query fields of signed URLs: of S3 and CloudFront, Google's storage, Azure's, and the usual names of others.
_SIGNATURES = {
    *("awsaccesskeyid", "signature", "expires", "policy", "key-pair-id", "googleaccessid"),
    *("sv", "ss", "srt", "sr", "sp", "se", "st", "spr", "sip", "sig", "skoid", "sktid", "skt", "ske", "sks", "skv"),
    *("token", "access_token"),
}
MOST_NAMED = 6  # kinds of files that a message names


def expand_shards(patterns: Sequence[str], remote: RemoteBlock = LOCAL_ONLY) -> list[Shard]:
    """All shards that the patterns name, sorted and without repeats; local ones as absolute paths.

    Each pattern is a path, a glob (`train-*.tar`), a brace pattern (`train-{000000..000099}.tar`), a mixture, or one of
    these as a URL (globs on s3 only), or a pipe. Each local name that braces expand to must exist, so a missing shard
    is found before the run starts; for URLs `load_index` finds it.
    Raises DataError for a pattern that matches nothing and for a URL or pipe that `remote` does not allow, RecipeError
    for one from a run directory, which does not keep passwords and signatures.
    """
    local: set[str] = set()
    others: set[str] = set()
    for pattern in patterns:
        if "\0" in pattern:
            raise DataError(f"shard pattern {shown(pattern)!r}: no path has the character NUL")
        if kind := shard_kind(pattern):
            others.update(_expand_remote(pattern, kind, remote))
        else:
            local.update(os.path.abspath(path) for path in _expand_local(pattern))
    return [*(Path(path) for path in sorted(local)), *sorted(others)]


def shard_name(shard: Shard) -> str:
    """The name of a shard in its folder's index.

    The file name, with a hash of the query if that distinguishes shards (`x.tar?part=1`). For a pipe the whole command;
    if it has secrets, they are masked and a hash follows.
    """
    if isinstance(shard, Path):
        return shard.name
    if shard_kind(shard) == "pipe":
        name = shown(shard)
        return name if name == shard else f"{name} #{hashlib.sha256(shard.encode()).hexdigest()[:12]}"
    fields = [pair for pair in parse_qsl(urlsplit(shard).query, keep_blank_values=True) if not _signs(pair[0])]
    # Hashed: a field that is not a known signature may be a secret too.
    mark = "?" + hashlib.sha256(repr(sorted(fields)).encode()).hexdigest()[:16] if fields else ""
    return urlsplit(shard).path.rsplit("/", 1)[-1] + mark


def _signs(field: str) -> bool:
    """Whether a query field grants access, and so may change, rather than names what is read."""
    return field.lower() in _SIGNATURES or field.lower().startswith(("x-amz-", "x-goog-"))


def shard_folder(shard: Shard) -> Path | str:
    """Where the shard and, perhaps, its index.json are: a folder, a URL that ends in `/`, or `pipe:`."""
    if isinstance(shard, Path):
        return shard.parent
    if shard_kind(shard) == "pipe":
        return PIPE
    return shard.partition("?")[0].rpartition("/")[0] + "/"


def shown(shard: Shard) -> str:
    """A shard for messages, with its secrets masked."""
    return str(shard) if isinstance(shard, Path) else shown_source(shard)


def _expand_local(pattern: str) -> Iterator[str]:
    if os.path.isfile(pattern):  # taken literally first: brackets and braces are legal in file names
        yield pattern
        return
    for name in _expand_braces(pattern):
        found = list(islice(iglob(os.path.expanduser(name), recursive=True), MAX_NAMES + 1))
        if len(found) > MAX_NAMES:
            raise DataError(f"{pattern!r} matches more than {MAX_NAMES:,} files: name the shards' own folder")
        files = [path for path in found if os.path.isfile(path)]
        if not files:
            part = "" if name == pattern else f" (at {name!r})"
            text = f"no shard matches {pattern!r}{part} in {os.getcwd()}"
            raise DataError(f"{text}: {_tars_there(name)}; correct the path or pack the shards")
        yield from files


def _tars_there(pattern: str) -> str:
    """A message about the tar files in the folder of a pattern, or why there are none."""
    folder = Path(os.path.expanduser(pattern)).parent
    if not folder.is_dir() and any(iglob(str(folder))):
        return f"{str(folder)!r} stands for folders without such files"
    if not folder.is_dir():
        return f"there is no folder {str(folder)!r}"
    try:
        names = sorted(path.name for path in folder.iterdir() if path.suffix == ".tar")
    except OSError as error:
        return f"{str(folder)!r} cannot be read ({error.strerror})"
    if not names:
        return f"there is no .tar file in {str(folder)!r}"
    kinds = sorted({re.sub(r"\d+(?=\.tar$)", "*", name) for name in names})
    more = f" and {len(kinds) - MOST_NAMED} more" if len(kinds) > MOST_NAMED else ""
    return f"{str(folder)!r} has {', '.join(map(repr, kinds[:MOST_NAMED]))}{more}"


def _expand_remote(pattern: str, kind: str, remote: RemoteBlock) -> Iterator[str]:
    if why := remote.refusal(pattern):
        raise DataError(f"shard pattern {shown(pattern)!r}: {why}")
    if is_masked(pattern):
        raise RecipeError(
            f"{pattern!r} has {MASK} in place of a password or signature, which a run directory does not keep: give "
            "the shards again, by --set STAGE.data.SPLIT=[...] or, to sfa evaluate, by --shards"
        )
    remember_source(pattern)
    for name in _expand_braces(pattern):
        if kind == "pipe" or not re.search(r"[*?[]" if kind == "s3" else r"\*", name):
            yield name
        elif kind == "s3":
            found = _list_s3(name, remote)
            if not found:
                raise DataError(f"no shard matches {shown(name)!r}: correct the pattern")
            yield from found
        else:
            raise DataError(
                f"shard pattern {shown(pattern)!r}: {kind} cannot list files, so * finds nothing: write the names with "
                "braces, as in train-{000000..000099}.tar"
            )


def _list_s3(pattern: str, remote: RemoteBlock) -> list[str]:
    try:
        return with_retries(lambda: list_s3(pattern, remote), remote.retries)
    except OSError as error:
        raise DataError(f"shard pattern {shown(pattern)!r} cannot be listed: {error.strerror or error}") from error


def _expand_braces(pattern: str) -> list[str]:
    try:
        return expand_braces(pattern)
    except ValueError as error:
        raise DataError(f"shard pattern {_start(pattern)!r} has {error}") from None


def _start(pattern: str) -> str:
    """A pattern for a message, cut to 200 characters."""
    text = shown(pattern)
    return text if len(text) <= 200 else f"{text[:200]}..."

"""`sfa index`: builds or verifies the index of shards."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from sfa_dist.boundary.plain import for_terminal
from sfa_dist.boundary.secret import without_secrets
from sfa_dist.data.shards.shard_index import build_indexes, verify_index
from sfa_dist.data.shards.shard_names import expand_shards
from sfa_dist.errors import DataError, UsageError
from sfa_dist.recipe.blocks import RemoteBlock, shard_kind

_EPILOG = """\
examples:
  sfa index shards/train-*.tar                          build index.json beside the shards
  sfa index 'shards/train-{000000..000099}.tar' --verify    read everything again and compare
  sfa index 's3://bucket/train-*.tar'                   fetch each shard once and write index.json beside them
"""


def add_parser(commands: Any) -> None:
    """Registers the sub-command."""
    parser = commands.add_parser(
        "index",
        help="build or verify the index of shards",
        description="Builds index.json beside WebDataset shards. With --verify it reads all shards and compares them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="paths, globs, brace patterns, URLs or pipes")
    parser.add_argument(
        "--verify", action="store_true", help="compare the shards with their index; exit code 65 if they differ"
    )
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="the recipe's data.remote.cache_dir: keeps fetched shards, and the index if it cannot be beside them",
    )
    parser.add_argument("--cache-gib", type=float, metavar="N", help="the recipe's data.remote.cache_gib")
    parser.add_argument("--anonymous", action="store_true", help="read s3 without credentials")
    parser.add_argument("--workers", type=int, default=4, help="shards to read at a time (default: %(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Builds or verifies the index. Raises UsageError, and DataError (exit code 65) for damaged shards."""
    remote = _remote(arguments)
    shards = expand_shards(arguments.shards, remote)
    if arguments.verify:
        problems = verify_index(shards, arguments.workers, remote)
        for problem in problems:
            print(for_terminal(without_secrets(problem), lines=False), file=sys.stderr)
        if problems:
            raise DataError(f"{len(problems)} problems in {len(shards)} shards, the first: {problems[0]}")
        print(f"{len(shards)} shards match their index")
        return 0
    entries, written = build_indexes(shards, arguments.workers, remote)
    samples = sum(len(entry.samples) for entry in entries.values())
    bad = [sample for entry in entries.values() for sample in entry.samples if sample.error]
    print(f"indexed {samples} samples in {len(shards)} shards, {len(bad)} of them cannot be used")
    for sample in bad[:5]:
        print(for_terminal(f"  {sample.key!r}: {sample.error}", lines=False))
    for location in written:
        print(f"index: {location}")
    return 0


def _remote(arguments: argparse.Namespace) -> RemoteBlock:
    """How shards are read: all kinds are allowed, since the command line names them.

    Raises UsageError for a pipe without --cache-dir: a run would not find its index.
    """
    if arguments.cache_dir is None:
        if any(shard_kind(shard) == "pipe" for shard in arguments.shards):
            raise UsageError("sfa index: a pipe needs --cache-dir DIR, the recipe's data.remote.cache_dir")
        return RemoteBlock(allow=["http", "https"], anonymous=arguments.anonymous)
    return RemoteBlock(
        allow=["http", "https", "pipe"],
        anonymous=arguments.anonymous,
        cache_dir=arguments.cache_dir,
        cache_gib=arguments.cache_gib,
    )

"""`sfa index`: builds or verifies the index of shards."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from sfa_dist.data.shard_index import build_index, verify_index
from sfa_dist.data.shards import expand_shards
from sfa_dist.errors import DataError

_EPILOG = """\
examples:
  sfa index shards/train-*.tar                          build index.json beside the shards
  sfa index 'shards/train-{000000..000099}.tar' --verify    read everything again and compare
"""


def add_parser(commands: Any) -> None:
    """Registers the sub-command."""
    parser = commands.add_parser(
        "index",
        help="build or verify the index of shards",
        description="Builds index.json beside WebDataset shards, or with --verify reads all shards again and compares.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="paths, globs or brace patterns")
    parser.add_argument(
        "--verify", action="store_true", help="compare instead of building; exit code 65 if they differ"
    )
    parser.add_argument("--workers", type=int, default=4, help="shards read at a time (default: %(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Builds or verifies. Raises DataError, which ends with exit code 65, for damaged shards."""
    paths = expand_shards(arguments.shards)
    if arguments.verify:
        problems = verify_index(paths, arguments.workers)
        for problem in problems:
            print(problem, file=sys.stderr)
        if problems:
            raise DataError(f"{len(problems)} problems in {len(paths)} shards, the first: {problems[0]}")
        print(f"{len(paths)} shards are what their index says")
        return 0
    entries = build_index(paths, workers=arguments.workers)
    samples = sum(len(entry.samples) for entry in entries.values())
    bad = [sample for entry in entries.values() for sample in entry.samples if sample.error]
    print(f"indexed {samples} samples in {len(paths)} shards, {len(bad)} of them cannot be used")
    for sample in bad[:5]:
        print(f"  {sample.key!r}: {sample.error}")
    return 0

"""`sfa cache`: builds the feature cache of a recipe, from the weights of its stage 1."""

from __future__ import annotations

import argparse
from typing import Any

from sfa_dist import train
from sfa_dist.errors import UsageError
from sfa_dist.run.train_options import add_arguments

_EPILOG = """\
examples:
  sfa cache --recipe recipes/l_128f.yaml --set stage2.cache.views=4
  torchrun --nproc-per-node 8 -m sfa_dist.tools.cli cache --recipe R --set stage2.cache.dir=/shared/k400_l_128f
The command may be stopped and run again at any time, on any number of ranks. `sfa train --stage cache` does the same.
"""


def add_parser(commands: Any) -> None:
    """Registers the sub-command."""
    parser = commands.add_parser(
        "cache",
        help="build the feature cache of a recipe",
        description="Runs the frozen trunk once over every video and view, and stores its output (docs/cache.md).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Builds what is missing of the cache. Raises SfaError, with the exit codes of the contract."""
    if arguments.stage not in (None, "cache"):
        raise UsageError(f"sfa cache runs the stage cache only: for --stage {arguments.stage} use `sfa train`")
    arguments.stage = "cache"
    train.run(arguments)

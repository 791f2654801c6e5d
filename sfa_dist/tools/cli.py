"""`sfa`: the console command of an installed package. Each sub-command is a thin file of this folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sfa_dist import __version__, train
from sfa_dist.tools import cache, chaos, evaluate, index, pack, plan, report, show, submit


def build_parser() -> argparse.ArgumentParser:
    """All sub-commands; each sets `run`, which takes the parsed arguments and returns an exit code."""
    parser = train.Parser(
        prog="sfa", description="Two-stage SFA training of video transformers.", epilog=train.EXIT_CODES
    )
    parser.add_argument("--version", action="version", version=f"sfa_dist {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=train.Parser)
    training = commands.add_parser(
        "train",
        help="train a recipe",
        description=train.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=train.EXIT_CODES,
    )
    train.add_arguments(training)
    training.set_defaults(run=train.run)
    for module in (pack, index, show, plan, cache, evaluate, report, submit, chaos):
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code of the contract."""
    return train.exit_code_of(argv, build_parser())


if __name__ == "__main__":
    sys.exit(main())

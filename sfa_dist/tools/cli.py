"""`sfa`: the console command of the installed package. Each sub-command is a module of this folder."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Callable, Sequence
from textwrap import fill
from typing import NoReturn

from sfa_dist import __version__, train
from sfa_dist.parallel.process_exit import exit_process, exit_when_asked
from sfa_dist.run.command_line import EXIT_CODES, Parser, exit_code_of, patience
from sfa_dist.run.train_options import DESCRIPTION, add_arguments
from sfa_dist.tools import (
    cache,
    chaos,
    check_learning,
    evaluate,
    index,
    init,
    motion_prior,
    pack,
    plan,
    predict,
    recipes,
    report,
    reproduce,
    show,
    submit,
)

HELP_WIDTH = 110
_STDOUT = 1


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands; each sets `run`, which takes the parsed arguments and returns an exit code."""
    parser = Parser(
        prog="sfa",
        description="Two-stage SFA training of video transformers.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sfa_dist {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=Parser)
    training = commands.add_parser(
        "train",
        help="train a recipe",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXIT_CODES,
    )
    add_arguments(training)
    training.set_defaults(run=train.run)
    modules = (
        *(pack, init, index, show, plan, check_learning, motion_prior, cache, evaluate, predict, report, recipes),
        *(submit, reproduce, chaos),
    )
    for module in modules:
        module.add_parser(commands)
    for command in commands.choices.values():
        if command.description and "\n" not in command.description:
            # argparse wraps either both or none, and an epilog has to stay as it is written.
            command.description = fill(command.description, HELP_WIDTH)
        command.set_defaults(run=_while_read(command.get_default("run")))
    return parser


def _while_read(run: Callable[[argparse.Namespace], int | None]) -> Callable[[argparse.Namespace], int | None]:
    """The command, but ending with 0 and without a message when the reader of its stdout leaves, as `| head` does.

    Any other broken pipe remains an error.
    """

    def quietly(arguments: argparse.Namespace) -> int | None:
        try:
            code = run(arguments)
            sys.stdout.flush()  # Here, because an error in the interpreter's last flush changes the exit code.
            return code
        except BrokenPipeError:
            if not _reader_left():
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
            return 0
        except SystemExit as error:
            if isinstance(error.__context__, BrokenPipeError):  # rich turns it into an exit, with stdout closed.
                return 0
            raise

    return quietly


def _reader_left() -> bool:
    poll = select.poll()
    poll.register(_STDOUT, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def main(argv: Sequence[str] | None = None) -> int:
    """Parses `argv` (default: the process's arguments) and runs; returns the exit code of the contract."""
    return exit_code_of(argv, build_parser())


def command() -> NoReturn:
    """The entry point that is installed as `sfa`."""
    exit_when_asked()
    code = main()
    exit_process(code, patience(code))


if __name__ == "__main__":
    command()

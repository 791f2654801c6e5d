"""Trains a recipe: command line -> recipe -> stages -> exit code. Runs as a script from a clean clone."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script has its own folder, sfa_dist/, first on the path: `import sfa_dist` fails there, and our modules could
    # shadow others. Put the repository root in its place.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from sfa_dist.parallel.process_exit import exit_when_asked  # Before the slow imports.

    exit_when_asked()

import argparse
import signal
from collections.abc import Sequence

from sfa_dist.errors import SfaError
from sfa_dist.parallel.environment import environment
from sfa_dist.parallel.launch import LauncherWatch, read_launch
from sfa_dist.parallel.process_exit import exit_process
from sfa_dist.parallel.stop_flag import StopFlag
from sfa_dist.run.command_line import EXIT_CODES, Parser, exit_code_of, patience
from sfa_dist.run.train_options import DESCRIPTION, add_arguments


def run(arguments: argparse.Namespace) -> None:
    """Runs the parsed command. Raises SfaError for errors that a user can act on."""
    # Slow imports wait until they are needed: --help, and the error for a typo in a recipe, need no torch.
    from sfa_dist.recipe.schema import load_recipe, print_recipe

    environ = environment()
    try:
        loaded = load_recipe(arguments.recipe, arguments.set, environ)
    except SfaError as error:  # All ranks of this machine read the same file: only the first prints the error.
        error.print_suppressed = environ.get("LOCAL_RANK", environ.get("SLURM_LOCALID", "0")) != "0"
        raise
    if arguments.print_recipe:
        print(print_recipe(loaded), end="")
        return
    stop = StopFlag()
    launcher = LauncherWatch(read_launch(environ).launcher)
    stop.install([signal.Signals[name] for name in loaded.recipe.stop.signals], launcher.lost)
    with stop.nothing_to_save():
        from sfa_dist.stages.pipeline import run_recipe

    run_recipe(
        loaded,
        stop,
        run_dir=arguments.run_dir or Path("runs") / loaded.recipe.name,
        resume=arguments.resume,
        only=arguments.stage,
        dry_run=arguments.dry_run,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parses `argv` (default: the process's arguments) and runs; returns the exit code of the contract."""
    parser = Parser(
        prog="train.py",
        description=DESCRIPTION,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.set_defaults(run=run)
    return exit_code_of(argv, parser)


if __name__ == "__main__":
    code = main()
    exit_process(code, patience(code))

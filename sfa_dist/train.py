"""Trains a recipe: argv -> Recipe -> stages -> exit code. The only wiring; runs as a script from a clean clone."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # As a script the folder sfa_dist/ itself is first on the path, where `import sfa_dist` fails and our modules could
    # shadow others; put the repository root in its place.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from sfa_dist.parallel.process_exit import exit_when_asked  # Before what takes long to import.

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
    """Runs the parsed command. Raises SfaError for what a user can act on."""
    # Imports that take long come only when they are needed: --help answers at once, and without torch so does a typo in
    # a recipe, also on a login node.
    from sfa_dist.recipe.schema import load_recipe, print_recipe

    environ = environment()
    try:
        loaded = load_recipe(arguments.recipe, arguments.set, environ)
    except SfaError as error:  # Every rank of this machine reads the same file: one of them tells.
        error.print_suppressed = environ.get("LOCAL_RANK", environ.get("SLURM_LOCALID", "0")) != "0"
        raise
    if arguments.print_recipe:
        print(print_recipe(loaded), end="")
        return
    stop = StopFlag()
    parents = LauncherWatch(read_launch(environ).launcher)
    stop.install([signal.Signals[name] for name in loaded.recipe.stop.signals], parents.lost)
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
    """Entry point; returns the exit code."""
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

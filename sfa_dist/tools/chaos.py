"""`sfa chaos`: injects faults into a recipe's run and prints the table of guarantees with what it saw."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from sfa_dist.errors import UsageError

DEFAULT_STEPS, DEFAULT_ROUNDS = 12, 5
FAILED = 70
LONGEST_TEMPORARY = 75  # Bytes of a folder's path: a socket's may have 107, of which multiprocessing adds 32.
FILE_WIDTH = 140  # Columns of the table if stdout is not a terminal.
_EPILOG = """\
examples:
  sfa chaos                                          the built-in recipe, all faults, on 1 and 2 ranks
  sfa chaos --recipe recipes/mine.yaml --tiny-model  your recipe and your clips with a tiny model
  sfa chaos --rounds 50 --thorough                   50 random kill points on 1 rank and on 2, every checkpoint file
  sfa chaos --only kill --only 34 --ranks 2          trials by name, or by row of docs/faults.md

Everything happens on copies, in a new folder. Exit codes: 0 all guarantees hold; 70 one does not, and its evidence is
kept; 65 and 78 as in training."""


def add_parser(commands: Any) -> None:
    """Registers the sub-command."""
    parser = commands.add_parser(
        "chaos",
        help="inject faults into a recipe's run, and check its guarantees",
        description="Kills, stops and damages runs of a recipe, shrunken for the CPU, resumes them, and compares them "
        "with an undisturbed run. Without --recipe it takes a built-in tiny recipe with generated clips.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", type=Path, help="the recipe to try (default: a built-in tiny one)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--tiny-model", action="store_true", help="replace the recipe's model by a tiny one")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="steps of each stage (default: %(default)s)")
    parser.add_argument("--ranks", type=_ranks, default=(1, 2), help="numbers of ranks to try (default: 1,2)")
    parser.add_argument("--rounds", type=int, default=DEFAULT_ROUNDS, help="random kill points (default: %(default)s)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME|ROW", help="only these (repeatable)")
    parser.add_argument("--thorough", action="store_true", help="damage every file of a checkpoint, not a random one")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a new folder to work in, which is kept (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="keep the run directories of trials that pass, too")
    parser.add_argument("--list", action="store_true", help="list the trials and exit")
    parser.add_argument("--json", action="store_true", help="print the table as JSON; the progress goes to stderr")
    parser.set_defaults(run=run)


def _ranks(text: str) -> tuple[int, ...]:
    ranks = tuple(int(word) for word in text.split(","))
    if not ranks or min(ranks) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers of ranks, such as 1,2")
    return ranks


def run(arguments: argparse.Namespace) -> int:
    """Plays the trials. Returns 0 if all guarantees hold, else 70. Raises SfaError for trials that cannot be played."""
    from rich.console import Console

    from sfa_dist.chaos.all_trials import select
    from sfa_dist.chaos.trial_table import list_table

    trials = select(arguments.only)
    if arguments.list:
        Console().print(list_table(trials))
        return 0
    _check(arguments, bool(trials))
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TEMPORARY:
        raise UsageError(
            f"the path of the folder {tempfile.gettempdir()} is too long for sockets in it: set TMPDIR to a shorter one"
        )
    folder, temporary = _folder(arguments.out)
    console = Console(stderr=arguments.json, width=None if sys.stdout.isatty() else FILE_WIDTH)
    before = signal.signal(signal.SIGTERM, _interrupt)  # As Ctrl-C: no process and no temporary file is left behind.
    keep = arguments.out is not None or arguments.keep
    try:
        failed = _play(arguments, trials, folder, console)
        keep = keep or failed
        return FAILED if failed else 0
    except KeyboardInterrupt:
        print("stopped: interrupted; all processes of the trials are ended", file=sys.stderr)
        return FAILED
    finally:
        signal.signal(signal.SIGTERM, before)
        if not keep and temporary:
            shutil.rmtree(folder, ignore_errors=True)


def _play(arguments: argparse.Namespace, trials: Any, folder: Path, console: Any) -> bool:
    """Plays the trials and prints their results; True if one failed."""
    from sfa_dist.chaos.bench import References
    from sfa_dist.chaos.builtin import write_builtin
    from sfa_dist.chaos.trial_table import as_json, progress_line, result_table
    from sfa_dist.chaos.trials import Options, play_all
    from sfa_dist.chaos.workplace import make_workplace
    from sfa_dist.parallel.environment import environment
    from sfa_dist.recipe.schema import load_recipe

    started = time.monotonic()
    recipe = arguments.recipe or write_builtin(folder / "builtin")
    loaded = load_recipe(recipe, arguments.set, environment())
    source = str(arguments.recipe) if arguments.recipe else "the built-in recipe"
    workplace = make_workplace(folder, loaded, source, arguments.steps, arguments.tiny_model)
    console.print(f"sfa chaos: {source}, in {folder}", markup=False, highlight=False)
    for note in workplace.notes:
        console.print(f"  {note}", markup=False, highlight=False)
    results = []
    options = Options(arguments.seed, arguments.rounds, arguments.thorough, arguments.keep)
    for result in play_all(trials, References(workplace), arguments.ranks, options):
        results.append(result)
        console.print(progress_line(result), highlight=False)
    seconds = time.monotonic() - started
    if arguments.json:
        print(json.dumps(as_json(results, workplace, arguments.seed, seconds), indent=2))
    else:
        console.print(result_table(results, seconds))
    failed = [result for result in results if not result.passed]
    if failed:
        console.print(f"{len(failed)} of {len(results)} failed; evidence in {folder}/trials", markup=False)
    return bool(failed)


def _check(arguments: argparse.Namespace, any_trial: bool) -> None:
    """Raises UsageError for mistakes that argparse cannot find."""
    if sys.platform != "linux":
        raise UsageError("sfa chaos needs Linux: it reads /proc")
    if not any_trial:
        raise UsageError(f"no trial is called {' or '.join(arguments.only)}: --list shows their names")
    if arguments.steps < 12 or arguments.rounds < 1:
        raise UsageError("--steps must be 12 or more, so that faults have room, and --rounds 1 or more")


def _folder(out: Path | None) -> tuple[Path, bool]:
    """The folder to work in, and whether it is temporary. Raises UsageError if it is not empty."""
    from sfa_dist.chaos.bench import temporary_folder

    if out is None:
        return temporary_folder(), True
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"--out {out} is not empty: give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    return out.resolve(), False


def _interrupt(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise KeyboardInterrupt

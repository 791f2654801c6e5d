"""`sfa check-learning`: checks whether a recipe can learn its clips, before hours are spent on training."""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from sfa_dist.errors import CHECKS_FAILED, RecipeError, UsageError
from sfa_dist.parallel.environment import environment
from sfa_dist.recipe.schema import STAGE_NAMES, Recipe, load_recipe

LEAST_SECONDS = 10.0
_EPILOG = """\
examples:
  sfa check-learning --recipe recipes/own_videos.yaml
  sfa check-learning --recipe mine.yaml --stage image --seconds 600 --json

In about --seconds it checks: the clips of each class, clips in both splits, videos that loop, the time of reading,
simple classifiers on small features, whether the recipe's own model learns a few clips by heart, a short training, and
the same with shuffled labels and with shuffled frames. It is one process and writes nothing. docs/learning.md explains
each line.
exit codes: 0 passed; 3 the checks ran, and one failed or had no time to end; 64 wrong command line; 65 bad data;
78 bad recipe"""


def add_parser(commands: Any) -> None:
    """Registers the sub-command."""
    parser = commands.add_parser(
        "check-learning",
        help="check in two minutes whether a recipe can learn its clips",
        description="Looks at a recipe's clips and trains its model on a few of them, so that mistakes show early.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--recipe", type=Path, required=True, help="the YAML file that describes the run")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    add("--stage", choices=STAGE_NAMES[:2], help="the stage to check (default: stage1, else image)")
    add("--seconds", type=float, default=120.0, help="the time for all checks together (default: %(default)s)")
    add("--json", action="store_true", help="print JSON, and nothing else, to stdout")
    add("--debug", action="store_true", help="print tracebacks")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Checks and prints; returns 0 or CHECKS_FAILED. Raises SfaError, with the exit codes of the contract."""
    if not arguments.seconds >= LEAST_SECONDS:
        raise UsageError(f"--seconds must be {LEAST_SECONDS:g} or more, not {arguments.seconds:g}")
    started, environ = time.monotonic(), environment()
    recipe = load_recipe(arguments.recipe, arguments.set, environ).recipe
    name = _stage(recipe, arguments.stage)
    from sfa_dist.parallel.launch import read_launch
    from sfa_dist.tools.learning_run import checks_of  # Imported here: it loads torch, which --help does not need.
    from sfa_dist.tools.learning_table import as_json, print_checks

    if read_launch(environ).world_size > 1:
        raise UsageError("sfa check-learning runs as one process: start it without a launcher")
    checks = []
    with redirect_stdout(sys.stderr):  # Libraries may print, but stdout is for the table.
        for check in checks_of(recipe, name, arguments.seconds):
            checks.append(check)
            print(f"[{time.monotonic() - started:4.0f} s] {check.name}: {check.verdict}", file=sys.stderr, flush=True)
    results = as_json(checks, time.monotonic() - started)
    print(json.dumps(results)) if arguments.json else print_checks(recipe.name, name, results)
    return 0 if results["passed"] else CHECKS_FAILED


def _stage(recipe: Recipe, wanted: str | None) -> str:
    """The stage to check. Raises RecipeError if the recipe does not have it, or has no clips for it."""
    present = [name for name in ("stage1", "image") if getattr(recipe, name) is not None]
    name = wanted or (present[0] if present else "stage1")
    if name not in present:
        raise RecipeError(f"the recipe has no stage {name} to check")
    if not getattr(recipe, name).data.train:
        raise RecipeError(f"{name}.data.train names no shards")
    if not (getattr(recipe, name).data.test or getattr(recipe, name).data.val):
        raise RecipeError(f"{name}: neither data.test nor data.val names shards: there are no clips to check it on")
    return name

"""`sfa evaluate`: tests a run or weights, over a single view or several."""

from __future__ import annotations

import argparse
import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfa_dist.boundary.secret import without_secrets_in
from sfa_dist.errors import SfaError, UsageError
from sfa_dist.inference.finished_stage import FinishedStage, finished_of_run, finished_of_weights, recipe_of_run
from sfa_dist.parallel.environment import environment
from sfa_dist.recipe.schema import LoadedRecipe, load_recipe

_EPILOG = """\
examples:
  sfa evaluate runs/h_96f                                     the run's last stage, as its recipe says
  sfa evaluate runs/h_96f --views 1x1,4x3 --stage stage1      another stage, single view and 4 x 3 views
  sfa evaluate --recipe R --weights stage2.safetensors --trunk-weights stage1.safetensors --shards 'test/*.tar'
  torchrun --nproc-per-node 8 -m sfa_dist.tools.cli evaluate runs/h_96f --json > scores.json
The scores go to <run>/evaluate/, or to --out; the run's result.json does not change. The shards are those of the
recipe's data.test, or of data.val if it has none; relative paths start in the current folder.
exit codes: 0 done; 64 wrong command line; 65 bad data; 74 missing weights; 78 recipe and weights disagree"""


def add_parser(commands: Any) -> None:
    """Registers the sub-command."""
    parser = commands.add_parser(
        "evaluate",
        help="test a run or weights over one view or several",
        description="Tests the weights of a run, or given ones, on the recipe's test clips. Under torchrun it uses all "
        "ranks.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run_dir", nargs="?", type=Path, metavar="RUN", help="a run directory, e.g. runs/h_96f")
    add("--recipe", type=Path, help="without RUN: the recipe of the weights")
    add("--weights", type=Path, help="without RUN: the final weights of a stage")
    add("--trunk-weights", type=Path, help="without RUN, for weights of stage2: the weights of its stage1")
    add("--stage", choices=("image", "stage1", "stage2"), help="default: the run's last, or the one the weights name")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    add("--views", metavar="TxS[,TxS]", help="temporal x spatial views, e.g. 4x3 or 1x1,4x3; the last is the result")
    add("--shards", action="append", default=[], metavar="SHARDS", help="test on these shards (repeatable)")
    add("--frames", type=int, metavar="N", help="frames of a clip, if not those of the training")
    add("--out", type=Path, metavar="FILE", help="the JSON file for the scores (default: in <run>/evaluate/)")
    add("--json", action="store_true", help="print the keys of result.json as JSON, and nothing else")
    add("--debug", action="store_true", help="print tracebacks")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Tests, prints and writes. Raises SfaError, with the exit codes of the contract."""
    from sfa_dist.parallel.launch import LauncherWatch, read_launch
    from sfa_dist.parallel.stop_flag import StopFlag

    environ = environment()
    stop = StopFlag()
    try:
        recipe_file = _check(arguments)
        views = _views(arguments.views)
        loaded = load_recipe(recipe_file, arguments.set, environ)
        stop.install(
            [signal.Signals[name] for name in loaded.recipe.stop.signals],
            LauncherWatch(read_launch(environ).launcher).lost,
        )
        with stop.nothing_to_save():
            from sfa_dist.inference.evaluate import default_out, evaluate_finished
        finished = _finished(arguments, loaded)
        wanted = _overrides(arguments, finished.stage, views)
        recipe = load_recipe(finished.recipe_file, [*arguments.set, *wanted], environ).recipe
    except SfaError as error:  # All ranks of this machine read the same files: only the first prints the error.
        error.print_suppressed = environ.get("LOCAL_RANK", environ.get("SLURM_LOCALID", "0")) != "0"
        raise
    asked = {
        "stage": finished.stage,
        "weights": str(finished.weights),
        "set": without_secrets_in(arguments.set),
        "shards": without_secrets_in(arguments.shards) or None,
    }
    out = arguments.out
    if out is None and finished.run_dir is not None:
        out = default_out(finished.run_dir, finished.stage, recipe, asked)
    evaluate_finished(recipe, finished, arguments.frames is not None, out, asked, arguments.json, stop)


def _check(arguments: argparse.Namespace) -> Path:
    """The recipe file. Raises UsageError unless either a run is given, or a recipe with weights."""
    alone = [name for name in ("recipe", "weights", "trunk_weights") if getattr(arguments, name) is not None]
    if arguments.run_dir is None and (arguments.recipe is None or arguments.weights is None):
        raise UsageError("sfa evaluate: give a run directory, or --recipe and --weights (see --help)")
    if arguments.run_dir is not None and alone:
        raise UsageError(
            f"sfa evaluate: a run has its own recipe and weights: leave out --{alone[0].replace('_', '-')}"
        )
    if arguments.out is not None and arguments.out.suffix != ".json":
        raise UsageError(f"--out {arguments.out}: the file's name must end with .json")
    return arguments.recipe if arguments.run_dir is None else recipe_of_run(arguments.run_dir)


def _views(text: str | None) -> list[tuple[int, int]]:
    if text is None:
        return []
    found = [re.fullmatch(r"([1-9]\d*)x([13])", part.strip()) for part in text.split(",")]
    if not all(found):
        raise UsageError(f"--views {text}: write temporal x spatial views such as 4x3 or 1x1,4x3; spatial is 1 or 3")
    return [(int(match[1]), int(match[2])) for match in found if match]


def _finished(arguments: argparse.Namespace, loaded: LoadedRecipe) -> FinishedStage:
    if arguments.run_dir is not None:
        return finished_of_run(loaded.recipe, arguments.run_dir, arguments.stage)
    files = (arguments.recipe, arguments.weights, arguments.trunk_weights)
    return finished_of_weights(loaded.recipe, *files, arguments.stage)


def _overrides(arguments: argparse.Namespace, stage: str, views: Sequence[tuple[int, int]]) -> list[str]:
    """The options as overrides of the recipe."""
    wanted = []
    if views:
        *also, (temporal, spatial) = views
        wanted += [f"test.temporal_views={temporal}", f"test.spatial_views={spatial}"]
        wanted += [f"test.also_views={json.dumps(also)}"]
    if arguments.shards:
        wanted.append(f"{stage}.data.test={json.dumps(arguments.shards)}")
    if arguments.frames is not None:
        wanted.append(f"{stage}.frames={arguments.frames}")
    return wanted

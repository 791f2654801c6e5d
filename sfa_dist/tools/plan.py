"""`sfa plan`: whether a recipe fits a card, how long it takes and what it costs, without a GPU."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from sfa_dist.errors import RecipeError, UsageError
from sfa_dist.parallel.environment import environment
from sfa_dist.plan.cards import DEFAULT_CARD, Card, card_of_size, find_card, with_memory
from sfa_dist.recipe.schema import STAGE_NAMES, load_recipe
from sfa_dist.tools.working import working

_EPILOG = """\
examples:
  sfa plan --recipe recipes/g_48f.yaml --card A100-40 --ranks 8
  sfa plan --recipe recipes/h_96f.yaml --card 3090 --nodes 2 --gpus-per-node 4 --set stage2.frames=256 --json
  sfa plan --recipe mine.yaml --gib 16 --clips 12000      a card by its memory; data that is not packed yet
  sfa plan --table4                                       the frames of the paper's Table 4, up to 1,024

exit codes: 0 every stage fits; 78 one does not. How it works, and its limits: docs/planning.md
"""


def add_parser(commands: Any) -> None:
    """Registers the sub-command."""
    parser = commands.add_parser(
        "plan",
        help="plan the memory, time and disk of a recipe before it runs",
        description="Prints whether a recipe fits a card, its peak memory by category, the largest frames and "
        "micro-batch that fit, hours, disk, and the cheapest change that makes it fit. Needs no GPU.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", type=Path, help="the YAML file that describes the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--stage", choices=STAGE_NAMES, help="plan only this stage")
    parser.add_argument("--card", help=f"a card by name, e.g. A100-80, V100-16, 3090 (default: {DEFAULT_CARD})")
    parser.add_argument("--gib", type=float, help="memory of the card in GiB; with --card, in place of its own")
    parser.add_argument("--ranks", type=int, help="number of GPUs (default: 1)")
    parser.add_argument("--nodes", type=int, help="with --gpus-per-node, in place of --ranks: number of nodes")
    parser.add_argument("--gpus-per-node", type=int, help="with --nodes: GPUs of each node")
    parser.add_argument("--clips", type=int, help="number of training clips, if there are no indexed shards")
    parser.add_argument("--probe", action="store_true", help="measure real steps on the GPU of this machine")
    parser.add_argument("--table4", action="store_true", help="the paper's Table 4 instead of a recipe")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Plans and prints; returns 0 if every stage fits, else 78. Raises UsageError and RecipeError."""
    ranks = _ranks(arguments)
    if arguments.table4:
        _require_alone(arguments)
        with working("memory of the models of Table 4", arguments.json):
            from sfa_dist.plan.table4 import print_table4, table4  # Imported here: it loads torch.

            rows = table4(ranks or 64)
        print(json.dumps([row.as_json() for row in rows], indent=1)) if arguments.json else print_table4(rows)
        return 0
    if arguments.recipe is None:
        raise UsageError("plan needs --recipe, or --table4")
    recipe = load_recipe(arguments.recipe, arguments.set, environment()).recipe
    if arguments.stage and getattr(recipe, arguments.stage) is None:
        raise RecipeError(f"--stage {arguments.stage}: the recipe has no such stage")
    card = _card(arguments)
    with working("loading torch", arguments.json) as progress:
        from sfa_dist.plan.recipe_plan import plan_recipe
        from sfa_dist.tools.plan_print import print_plan
        from sfa_dist.tools.plan_probe import probe_recipe

        if arguments.probe:
            progress("measuring steps on the GPU")
        measured = probe_recipe(recipe, arguments.stage) if arguments.probe else {}
        plan = plan_recipe(
            recipe,
            card,
            ranks or 1,
            clips=arguments.clips,
            only=arguments.stage,
            micro_seconds={name: probe.micro_seconds for name, probe in measured.items()},
            report=progress,
        )
    if not plan.stages:
        raise RecipeError("the recipe trains nothing: stage1.weights are given and there is no other stage")
    if arguments.json:
        extra = {"probe": {name: probe.as_json() for name, probe in measured.items()}} if measured else {}
        print(json.dumps({**plan.as_json(), **extra}, indent=1))
    else:
        print_plan(plan, bool(measured))
    return 0 if plan.fits else RecipeError.exit_code


def _ranks(arguments: argparse.Namespace) -> int | None:
    by_node = (arguments.nodes, arguments.gpus_per_node)
    if arguments.ranks is not None and any(value is not None for value in by_node):
        raise UsageError("give either --ranks, or --nodes and --gpus-per-node")
    if (arguments.nodes is None) != (arguments.gpus_per_node is None):
        raise UsageError("--nodes and --gpus-per-node go together")
    for name in ("ranks", "nodes", "gpus_per_node", "clips", "gib"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} must be a number greater than 0, not {value}")
    return arguments.nodes * arguments.gpus_per_node if arguments.nodes is not None else arguments.ranks


def _require_alone(arguments: argparse.Namespace) -> None:
    """Raises UsageError for options that Table 4, which has its own recipes and cards, would ignore."""
    for name in ("recipe", "set", "stage", "card", "gib", "clips", "probe"):
        if getattr(arguments, name):
            raise UsageError(f"--table4 has its own models and cards: leave --{name} out, or --table4")


def _card(arguments: argparse.Namespace) -> Card:
    if arguments.card is None:
        return find_card(DEFAULT_CARD) if arguments.gib is None else card_of_size(arguments.gib)
    card = find_card(arguments.card)
    return card if arguments.gib is None else with_memory(card, arguments.gib)

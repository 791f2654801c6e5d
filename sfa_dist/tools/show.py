"""`sfa show`: draws contact sheets of what a recipe's augmentation does to clips."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sfa_dist.recipe.schema import STAGE_NAMES

_EPILOG = """\
examples:
  sfa show --recipe recipes/h_96f.yaml --out figures/             the first clips of data.train
  sfa show --recipe recipes/something_something_v2/l_128f.yaml --out figures/ --generated

The sheets show the frames that are sampled; each augmentation of the recipe, alone and at full probability; the whole
chain, which is exactly what training sees; and the test's views. Rows are frames, columns are draws.
"""


def add_parser(commands: Any) -> None:
    """Registers the sub-command."""
    parser = commands.add_parser(
        "show",
        help="draw contact sheets of a recipe's augmentation",
        description="Writes PNGs of clips as the recipe samples and augments them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", type=Path, required=True, help="the YAML file that describes the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--stage", choices=STAGE_NAMES, help="the stage to show (default: the last one)")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the PNGs")
    parser.add_argument("--draws", type=int, default=6, help="draws to show, as columns (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=5, help="frames to show of a clip, as rows (default: %(default)s)")
    parser.add_argument("--generated", action="store_true", help="use generated clips in place of data.train")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Writes the sheets and prints their paths. Raises UsageError, RecipeError and DataError."""
    from sfa_dist.tools.show_sheets import show_sheets  # Imported here: it loads torch.

    return show_sheets(arguments)

"""`sfa show`: what a recipe's augmentation does to clips, as contact sheets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sfa_dist.recipe.schema import STAGE_NAMES

_EPILOG = """\
examples:
  sfa show --recipe recipes/h_96f.yaml --out figures/             the first clips of data.train
  sfa show --recipe recipes/something_something_v2/l_128f.yaml --out figures/ --generated

A sheet for each augmentation that the recipe has on, alone and at full probability, one of the test's views, and one
of the whole chain: the very pixels that training sees. Rows are frames, columns are draws.
"""


def add_parser(commands: Any) -> None:
    """Registers the sub-command."""
    parser = commands.add_parser(
        "show",
        help="contact sheets of a recipe's augmentation",
        description="Writes PNGs of clips as the recipe cuts and augments them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", type=Path, required=True, help="the YAML that describes the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--stage", choices=STAGE_NAMES, help="of this stage (default: the last one)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the PNGs")
    parser.add_argument("--draws", type=int, default=6, help="columns (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=5, help="frames shown of a clip (default: %(default)s)")
    parser.add_argument("--generated", action="store_true", help="draw clips instead of reading data.train")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Writes the sheets and names them. Raises UsageError, RecipeError and DataError."""
    from sfa_dist.tools.show_sheets import show_sheets  # Here, since it brings torch: --help does without.

    return show_sheets(arguments)

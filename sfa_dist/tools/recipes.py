"""`sfa recipes`: the recipes that come with the package."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sfa_dist.recipe.shipped import RECIPES, shipped, shipped_recipes

_EPILOG = """\
examples:
  sfa recipes                                        their names, which --recipe accepts in any folder
  sfa train --recipe recipes/h_96f.yaml --dry-run
Your own recipe can start from any of them: write _base_: recipes/h_96f.yaml, and below it only what differs. A folder
recipes/ of your own comes first.
"""


def add_parser(commands: Any) -> None:
    """Registers the sub-command."""
    parser = commands.add_parser(
        "recipes",
        help="list the recipes that come with the package",
        description="Lists the recipes that come with the package.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of {name, title, file}")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the name of each recipe with the first line of its comment."""
    rows = [_row(name) for name in shipped_recipes()]
    if arguments.json:
        print(json.dumps(rows))
        return 0
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(f"{row['name']:{width}}  {row['title']}".rstrip())
    return 0


def _row(name: str) -> dict[str, str]:
    file = shipped(RECIPES) / name.removeprefix(f"{RECIPES}/")
    first = file.read_text(encoding="utf-8").split("\n", 1)[0]
    return {"name": name, "title": first.removeprefix("# ") if first.startswith("#") else "", "file": str(file)}

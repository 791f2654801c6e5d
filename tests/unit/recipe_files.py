"""A recipe of a few lines, and what is wrong with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sfa_dist.errors import RecipeError
from sfa_dist.recipe.schema import load_recipe
from sfa_dist.recipe.strict_yaml import parse, plain

MINIMAL = """\
model: {size: tiny, classes: 10}
optimizer: {lr: 0.1}
schedule: {epochs: 2}
stage1: {frames: 4}
"""


WriteRecipe = Callable[..., Path]  # The fixture `write_recipe`: (text, name) -> path.


def errors_of(path: Path, *overrides: str, **environ: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides, environ)
    assert caught.value.exit_code == 78
    return str(caught.value)


def read(text: str) -> Any:
    return plain(parse(text, source=lambda line: f"t:{line}"))

"""`sfa:NAME`: weights that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_files import MINIMAL, WriteRecipe, errors_of

from sfa_dist.errors import RecipeError
from sfa_dist.recipe.schema import load_recipe
from sfa_dist.recipe.shipped import shipped_weights, weights_path


def test_a_name_is_a_file_and_a_file_is_itself() -> None:
    assert shipped_weights() == ["sfa:motion-tiny"]
    file = weights_path("sfa:motion-tiny")
    assert file.is_file()
    assert file.with_name(f"{file.name}.sha256").is_file()
    assert weights_path("some/own.safetensors") == Path("some/own.safetensors")


@pytest.mark.parametrize("name", ["sfa:motion-huge", "sfa:", "sfa:../weights/motion-tiny", "sfa:*"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str, write_recipe: WriteRecipe) -> None:
    with pytest.raises(RecipeError, match=r"it has sfa:motion-tiny$"):
        weights_path(name)
    error = errors_of(write_recipe(MINIMAL.replace("{frames: 4}", f"{{image_checkpoint: '{name}'}}")))
    assert error.startswith("a.yaml:4: stage1.image_checkpoint: ")
    assert error.endswith(f"the package has no weights {name}: it has sfa:motion-tiny")


def test_a_recipe_may_name_them(write_recipe: WriteRecipe) -> None:
    path = write_recipe(MINIMAL.replace("{frames: 4}", "{image_checkpoint: 'sfa:motion-tiny'}"))
    recipe = load_recipe(path, [], {}).recipe
    assert recipe.stage1 is not None
    assert recipe.stage1.image_checkpoint == "sfa:motion-tiny"

"""docs/recipe.md names every key of the schema, with its type, its default and its docstring."""

from __future__ import annotations

import pytest
from pydantic import BaseModel
from recipe_keys import PAGE, all_blocks, key_meanings, page_with_keys

from sfa_dist.recipe.blocks import Fixed, RecipeBlock


class Undocumented(RecipeBlock):
    known: Fixed[int] = 0
    """Something, in
    two lines."""

    new: Fixed[int] = 0
    newer: Fixed[int] = 0

    def method(self) -> int:
        """No key's docstring."""
        return self.new


def test_the_page_holds_the_keys_of_the_schema() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page_with_keys(text) == text, "run `python tests/unit/recipe_keys.py`"


@pytest.mark.parametrize("block", all_blocks(), ids=lambda block: block.__name__)
def test_every_key_has_a_docstring(block: type[BaseModel]) -> None:
    silent = [key for key, meaning in key_meanings(block).items() if not meaning.endswith(".")]
    assert silent == [], "write a sentence below the key: what it does, its unit, what null or 0 means"


def test_every_key_is_asked_for_its_docstring() -> None:
    for block in all_blocks():
        asked = {key for base in block.__mro__ if base in all_blocks() for key in key_meanings(base)}
        assert asked == set(block.model_fields)


def test_a_key_without_a_docstring_is_seen() -> None:
    assert key_meanings(Undocumented) == {"known": "Something, in two lines.", "new": "", "newer": ""}

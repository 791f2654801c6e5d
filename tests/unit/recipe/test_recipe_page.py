"""docs/recipe.md names every key of the schema, with its type and default."""

from __future__ import annotations

from recipe_keys import PAGE, page_with_keys


def test_the_page_holds_the_keys_of_the_schema() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page_with_keys(text) == text, "run `python tests/unit/recipe_keys.py`"

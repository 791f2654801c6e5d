"""The table of all recipe keys in docs/recipe.md, from the schema of the recipe.

python tests/unit/recipe_keys.py     writes the table into docs/recipe.md
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sfa_dist.recipe.schema import Recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipe.md"
START = "<!-- keys: written by tests/unit/recipe_keys.py -->"


def page_with_keys(text: str) -> str:
    """The page with all that follows the mark made anew. Raises ValueError for a page without the mark."""
    head, mark, _ = text.partition(START)
    if not mark:
        raise ValueError(f"{PAGE} has no line {START}")
    return head + START + "\n\n" + "\n\n".join(_sections()) + "\n"


def _sections() -> Iterator[str]:
    for block, places in _places().items():
        rows = [_row(name, field) for name, field in block.model_fields.items()]
        where = ", ".join(f"`{place}`" if place else "top level" for place in places)
        note = _docstring(block)
        table = "\n".join(["| key | type | default |", "|---|---|---|", *rows])
        yield "\n\n".join([f"### {_title(block)}", f"Where: {where}.", *([note] if note else []), table])


def _places() -> dict[type[BaseModel], list[str]]:
    """Every block of the recipe, and the keys under which it stands (of stages, below any stage: `<stage>`)."""
    found: dict[type[BaseModel], list[str]] = {Recipe: [""]}
    queue = [(Recipe, "")]
    for block, place in queue:
        for name, field in block.model_fields.items():
            for inner in _blocks_in(field.annotation):
                where = f"{place}.{name}" if place else name
                where = re.sub(r"^(image|stage1|stage2)\.(?!adapter|cache)", "<stage>.", where)
                if inner not in found:
                    found[inner] = []
                    queue.append((inner, where))
                if where not in found[inner]:
                    found[inner].append(where)
    return found


def _blocks_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for part in get_args(annotation) for block in _blocks_in(part)]


def _row(name: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else _value(field.get_default(call_default_factory=True))
    return f"| `{name}` | {_type(field.annotation)} | {default} |"


def _value(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "its defaults"
    return f"`{json.dumps(value)}`"


def _type(annotation: Any) -> str:
    """A type in words: `a` or `b`, a list of numbers, a block."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if annotation is Any:
        return "any value"
    if origin is Annotated:
        return _type(parts[0])
    if origin is Literal:
        return " or ".join(f"`{json.dumps(part) if not isinstance(part, str) else part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_type, parts))
    if origin in (list, tuple):
        return "list of " + _type(parts[0])
    if origin is dict:
        return f"map of {_type(parts[0])} to {_type(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "block"
    return {bool: "true or false", int: "integer", float: "number", str: "text"}[annotation]


def _docstring(block: type[BaseModel]) -> str:
    return inspect.cleandoc(block.__doc__) if block.__doc__ else ""


def _title(block: type[BaseModel]) -> str:
    words = block.__name__.removesuffix("Block")
    return re.sub(r"(?<=[a-z])(?=[A-Z0-9])", " ", words).lower().capitalize()


if __name__ == "__main__":
    PAGE.write_text(page_with_keys(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

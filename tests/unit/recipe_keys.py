"""The list of all recipe keys in docs/recipe.md, from the schema of the recipe: types, defaults and docstrings.

python tests/unit/recipe_keys.py     writes the list into docs/recipe.md
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sfa_dist.recipe.schema import STAGE_NAMES, Recipe, StageBlock
from sfa_dist.recipe.strict_yaml import format_value

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipe.md"
START = "<!-- keys: written by tests/unit/recipe_keys.py -->"


def page_with_keys(text: str) -> str:
    """The page with all that follows the mark made anew. Raises ValueError for a page without the mark."""
    head, mark, _ = text.partition(START)
    if not mark:
        raise ValueError(f"{PAGE} has no line {START}")
    return head + START + "\n\n" + "\n\n".join(_sections()) + "\n"


def key_meanings(block: type[BaseModel]) -> dict[str, str]:
    """What the block itself says of each of its keys: the docstring below the field, on one line, or ""."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(block))).body
    assert isinstance(definition, ast.ClassDef)
    meanings = {}
    for statement, below in pairwise([*definition.body, ast.Pass()]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
            meanings[statement.target.id] = " ".join(str(found).split())
    return meanings


def all_blocks() -> dict[type[BaseModel], list[str]]:
    """Every block of the recipe, and the dotted keys that hold it (of stages, below any stage: `<stage>`)."""
    found: dict[type[BaseModel], list[str]] = {Recipe: [""], StageBlock: list(STAGE_NAMES)}
    queue = [(Recipe, "")]
    for block, path in queue:
        for name, field in block.model_fields.items():
            for inner in _blocks_in(field.annotation):
                key = f"{path}.{name}" if path else name
                key = re.sub(r"^(image|stage1|stage2)\.(?!adapter|cache)", "<stage>.", key)
                if inner not in found:
                    found[inner] = []
                    queue.append((inner, key))
                if key not in found[inner]:
                    found[inner].append(key)
    return found


def _sections() -> Iterator[str]:
    for block, paths in all_blocks().items():
        where = f"Key: {', '.join(f'`{path}`' for path in paths)}." if block is not Recipe else "The top level."
        keys = "\n".join(_line(name, block.model_fields[name], text) for name, text in key_meanings(block).items())
        inherits = f"It has the keys of [every stage](#stage){', and:' if keys else '.'}"
        intro = inherits if StageBlock in block.__bases__ else ""
        yield "\n\n".join(filter(None, (f"### {_title(block)}", where, _docstring(block), intro, keys)))


def _blocks_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for part in get_args(annotation) for block in _blocks_in(part)]


def _line(name: str, field: FieldInfo, meaning: str) -> str:
    default = "required" if field.is_required() else _value(field.get_default(call_default_factory=True))
    kind = ", ".join(filter(None, (_type(field.annotation), default)))
    return _wrapped(f"- **`{name}`** ({kind}): {meaning}", indent="  ")


def _value(value: Any) -> str:
    return f"default `{'{}' if isinstance(value, BaseModel) else format_value(value)}`"


def _type(annotation: Any) -> str:
    """A type in words: a, b or c."""
    *first, last = _options(annotation)
    return f"{', '.join(first)} or {last}" if first else last


def _options(annotation: Any) -> list[str]:
    """The types and values that a key takes, in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _options(parts[0])
    if origin is Literal:
        return [f"`{part}`" for part in parts]
    if origin in (Union, types.UnionType):
        return [option for part in parts for option in _options(part)]
    if origin in (list, tuple):
        return ["list of " + _type(parts[0])]
    if origin is dict:
        return [f"map of {_type(parts[0])} to {_type(parts[1])}"]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        title = _title(annotation)
        return [f"block [{title}](#{title.lower().replace(' ', '-')})"]
    plain = {bool: "true or false", int: "integer", float: "number", str: "text", Any: "any value", type(None): "null"}
    return [plain[annotation]]


def _docstring(block: type[BaseModel]) -> str:
    paragraphs = inspect.cleandoc(block.__doc__ or "").split("\n\n")
    return "\n\n".join(_wrapped(" ".join(text.split())) for text in paragraphs)


def _wrapped(text: str, indent: str = "") -> str:
    """At most 120 characters a line, and pages that it names (docs/data.md) as links from the page beside them."""
    linked = re.sub(r"docs/(\w+\.md)", r"[\1](\1)", text)
    return textwrap.fill(linked, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _title(block: type[BaseModel]) -> str:
    words = block.__name__.removesuffix("Block")
    return re.sub(r"(?<=[a-z])(?=[A-Z0-9])", " ", words).lower().capitalize()


if __name__ == "__main__":
    PAGE.write_text(page_with_keys(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

"""What all blocks of a recipe are made of: the base class and the types of plain values."""

from __future__ import annotations

import functools
import unicodedata
from enum import Enum, auto
from typing import Annotated, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_NAME_BYTES = 255  # File systems allow no longer name.


def _folder_name(name: str) -> str:
    why = None
    if name.strip() != name or not name:
        why = "it is empty, or begins or ends with a space"
    elif name in (".", "..") or "/" in name:
        why = "it leads to another folder (--run-dir chooses where a run is)"
    elif name.startswith("-"):
        why = "a command takes it for an option"
    elif any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
        why = "it holds a character that cannot be shown"
    elif len(name.encode()) > MAX_NAME_BYTES:
        why = f"it is longer than {MAX_NAME_BYTES} bytes"
    if why:
        raise ValueError(f"name: a run's name is the name of one folder, and {name[:60]!r} is not: {why}")
    return name


FolderName = Annotated[str, AfterValidator(_folder_name)]
PathText = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(gt=0, lt=2**31)]
NonNegative = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Finite = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Mark(Enum):
    """Whether a key may change between a run and its continuation; the type of each key says it."""

    FIXED = auto()
    FREE = auto()


T = TypeVar("T")
# A key that the result depends on: with another value it is another run.
Fixed = Annotated[T, Mark.FIXED]
# A key that says where and how the result is computed, not what it is. Shards and starting weights are free, because
# hashes of their content are compared instead.
Free = Annotated[T, Mark.FREE]


class RecipeBlock(BaseModel):
    """Base of all blocks: immutable, no unknown keys, no silent type conversion.

    Each key is `Fixed[...]` or `Free[...]`, except one that holds a block: the keys of that block are marked instead.
    The docstring below each key says what it does, in which unit, and what null or 0 means; docs/recipe.md lists them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def field_error(field: str, message: str) -> PydanticCustomError:
    """An error of a whole block that is reported at the line of one of its fields."""
    return PydanticCustomError("recipe", "{message}", {"field": field, "message": message})


def block_in(annotation: object) -> type[RecipeBlock] | None:
    """The block that a key holds, optional or not; None where it holds plain values."""
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, RecipeBlock):
            return option
    return None


def key_marks(block: type[RecipeBlock], prefix: str = "") -> dict[str, tuple[Mark, ...]]:
    """The marks of every key of a block and of the blocks in it, by dotted name."""
    marks: dict[str, tuple[Mark, ...]] = {}
    for name, field in block.model_fields.items():
        if inner := block_in(field.annotation):
            marks |= key_marks(inner, f"{prefix}{name}.")
        else:
            marks[prefix + name] = tuple(mark for mark in field.metadata if isinstance(mark, Mark))
    return marks


@functools.cache
def free_keys(*blocks: type[RecipeBlock]) -> frozenset[str]:
    """Dotted names of the keys that may change while a run goes on, in any of the blocks."""
    return frozenset(key for block in blocks for key, marks in key_marks(block).items() if marks == (Mark.FREE,))

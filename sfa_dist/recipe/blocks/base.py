"""What all blocks of a recipe are made of: the base class and the types of plain values."""

from __future__ import annotations

import unicodedata
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_NAME_BYTES = 255  # Of one name in a file system.


def _folder_name(name: str) -> str:
    why = None
    if name.strip() != name or not name:
        why = "it is empty, or begins or ends with a space"
    elif name in (".", "..") or "/" in name:
        why = "it leads to another folder (a run's place is --run-dir)"
    elif name.startswith("-"):
        why = "a command takes it for an option"
    elif any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
        why = "it holds a character that cannot be shown"
    elif len(name.encode()) > MAX_NAME_BYTES:
        why = f"it is longer than {MAX_NAME_BYTES} bytes"
    if why:
        raise ValueError(f"name: a run's name is one folder's name, and {name[:60]!r} is none: {why}")
    return name


FolderName = Annotated[str, AfterValidator(_folder_name)]
PathText = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(gt=0, lt=2**31)]
NonNegative = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Finite = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class RecipeBlock(BaseModel):
    """Base of all blocks: immutable, no unknown keys, no silent type conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def field_error(field: str, message: str) -> PydanticCustomError:
    """An error of a whole block that is reported at the line of one of its fields."""
    return PydanticCustomError("recipe", "{message}", {"field": field, "message": message})

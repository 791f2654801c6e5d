"""What all blocks of a recipe are made of: the base class and the types of plain values."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Finite = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Block(BaseModel):
    """Base of all blocks: immutable, no unknown keys, no silent type conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def complain(field: str, message: str) -> PydanticCustomError:
    """An error of a whole block that is reported at the line of one of its fields."""
    return PydanticCustomError("recipe", "{message}", {"field": field, "message": message})

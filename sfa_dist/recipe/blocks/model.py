"""What is trained: the factorised encoder and its adapter."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sfa_dist.recipe.blocks.base import Fixed, Fraction, NonNegative, Positive, RecipeBlock, field_error

Classes = Annotated[int, Field(ge=2, lt=2**31)]

# The labels of an action, in the order of the official code: logits, label columns and action numbers follow it.
LABEL_HEADS = ("noun", "verb")


POSITION_STD = 0.02  # The official code's.


class ModelBlock(RecipeBlock):
    """The factorised encoder. `size` gives the five dimensions at the end; each may be overridden.

    `classes` is the number of logits. For clips that have a noun and a verb in place of one label,
    `class_heads: {noun: 300, verb: 97}` divides them, and `classes` is their sum and may be left out.
    `gelu` and `norm_eps` are those of the spatial encoder, as its image checkpoint needs them (docs/weights.md); null
    is tanh and 1.0e-06, the official code's, which the temporal encoder always has. `position_std` is the standard
    deviation of the spatial encoder's positions where they start at random (docs/learning.md); those of the temporal
    encoder start with 0.02. `positions: sincos` are fixed ones of the spatial encoder: sines and cosines of row and
    column.
    `subtract` takes what does not move away from the pixels: each clip's own mean or median over its frames.
    `centre` takes from the vectors of a clip's tubelet steps their mean, before the adapter.
    """

    size: Fixed[Literal["tiny", "B", "L", "H", "g"]]
    classes: Fixed[Classes]
    class_heads: Fixed[dict[str, Classes] | None] = None
    temporal_depth: Fixed[NonNegative] = 4
    image_size: Fixed[Positive] = 224
    tubelet: Fixed[Positive] = 2
    pooling: Fixed[Literal["cls", "gap"]] = "cls"
    drop_path: Fixed[Fraction] = 0.0
    gelu: Fixed[Literal["tanh", "erf", "quick"] | None] = None
    norm_eps: Fixed[Annotated[float, Field(gt=0.0, le=0.01)] | None] = None
    positions: Fixed[Literal["learned", "sincos"]] = "learned"
    subtract: Fixed[Literal["none", "mean", "median"]] = "none"
    centre: Fixed[bool] = False
    position_std: Fixed[Annotated[float, Field(gt=0.0, le=10.0)]] = POSITION_STD
    width: Fixed[Positive | None] = None
    depth: Fixed[Positive | None] = None
    heads: Fixed[Positive | None] = None
    mlp: Fixed[Positive | None] = None
    patch: Fixed[Positive | None] = None

    @model_validator(mode="before")
    @classmethod
    def _classes_are_those_of_the_heads(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if isinstance(values.get("heads"), dict):
            raise field_error("heads", "is the number of attention heads; for nouns and verbs write model.class_heads")
        heads = values.get("class_heads")
        if isinstance(heads, dict) and values.get("classes") is None and all(type(n) is int for n in heads.values()):
            return {**values, "classes": sum(heads.values())}
        return values

    @model_validator(mode="after")
    def _heads_are_noun_and_verb(self) -> ModelBlock:
        if self.class_heads is None:
            return self
        if tuple(self.class_heads) != LABEL_HEADS:
            raise field_error("class_heads", f"has to be {' and '.join(LABEL_HEADS)}, in this order")
        if self.classes != sum(self.class_heads.values()):
            total = " + ".join(map(str, self.class_heads.values()))
            raise field_error("classes", f"{self.classes} is not {total}, the sum of model.class_heads: leave it out")
        return self

    @model_validator(mode="after")
    def _fixed_positions_have_no_scale(self) -> ModelBlock:
        if self.positions == "sincos" and self.position_std != POSITION_STD:
            raise field_error("position_std", "is of positions that are learned: leave it out with positions: sincos")
        return self

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """How the logits are divided: (300, 97); () where each clip has one label."""
        return tuple((self.class_heads or {}).values())


class AdapterBlock(RecipeBlock):
    """The two-layer MLP between spatial and temporal encoder. `hidden` is its width as a multiple of the model's."""

    hidden: Fixed[Annotated[float, Field(gt=0.0, le=8.0)]] = 0.5
    residual: Fixed[bool] = True
    placement: Fixed[Literal["pooled", "tokens"]] = "pooled"

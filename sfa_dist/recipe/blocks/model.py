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
    """The factorised encoder.

    `gelu` and `norm_eps` belong to the spatial encoder and have to match its image checkpoint (docs/weights.md). The
    temporal encoder always has the official code's values.
    """

    size: Fixed[Literal["tiny", "B", "L", "H", "g"]]
    """Size of the model: it sets `width`, `depth`, `heads`, `mlp` and `patch`, each of which may be overridden."""

    classes: Fixed[Classes]
    """Number of logits; may be left out where `class_heads` gives them."""

    class_heads: Fixed[dict[str, Classes] | None] = None
    """Logits of each head for clips with a noun and a verb: `{noun: 300, verb: 97}`. null: one label a clip."""

    temporal_depth: Fixed[NonNegative] = 4
    """Blocks of the temporal encoder; 0 takes the mean over time instead."""

    image_size: Fixed[Positive] = 224
    """Side of the square crop, pixels; a multiple of `patch`."""

    tubelet: Fixed[Positive] = 2
    """Frames of one tubelet."""

    pooling: Fixed[Literal["cls", "gap", "attention"]] = "cls"
    """How tokens become one vector, in both encoders: the `cls` token; `gap`, their mean; or `attention`, a learned
    query's attention to them and an MLP, with the heads and the MLP width of a block (docs/learning.md)."""

    drop_path: Fixed[Fraction] = 0.0
    """Rate of stochastic depth at the last block; it grows linearly from 0 at the first one."""

    gelu: Fixed[Literal["tanh", "erf", "quick"] | None] = None
    """GELU of the spatial encoder; null is `tanh`, the official code's."""

    norm_eps: Fixed[Annotated[float, Field(gt=0.0, le=0.01)] | None] = None
    """Epsilon of the spatial encoder's layer norms; null is 1.0e-06, the official code's."""

    positions: Fixed[Literal["learned", "sincos"]] = "learned"
    """Positions of the spatial encoder: `learned`, or `sincos`, fixed sines and cosines of row and column
    (docs/learning.md)."""

    subtract: Fixed[Literal["none", "mean", "median"]] = "none"
    """Take from a clip's pixels their `mean` or `median` over its frames, which removes what does not move
    (docs/learning.md)."""

    centre: Fixed[bool] = False
    """Take from the pooled vectors of a clip their mean over its tubelet steps, before the adapter
    (docs/learning.md)."""

    position_std: Fixed[Annotated[float, Field(gt=0.0, le=10.0)]] = POSITION_STD
    """Standard deviation of the spatial encoder's learned positions where they start from random values; the temporal
    encoder's is always the official code's (docs/learning.md)."""

    tubelet_init: Fixed[Literal["random", "difference"]] = "random"
    """How the tubelet kernel starts without an image checkpoint, which gives the kernel of its central frame: `random`,
    or `difference`, where half of the filters are the difference of two successive frames (docs/learning.md)."""

    width: Fixed[Positive | None] = None
    """Width of the tokens; null: by `size`."""

    depth: Fixed[Positive | None] = None
    """Blocks of the spatial encoder; null: by `size`."""

    heads: Fixed[Positive | None] = None
    """Attention heads of each block; null: by `size`."""

    mlp: Fixed[Positive | None] = None
    """Width of the MLP in each block; null: by `size`."""

    patch: Fixed[Positive | None] = None
    """Side of a patch, pixels; null: by `size`."""

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
            raise field_error("position_std", "applies to learned positions: leave it out with positions: sincos")
        return self

    @model_validator(mode="after")
    def _a_difference_is_of_two_frames(self) -> ModelBlock:
        if self.tubelet_init == "difference" and self.tubelet < 2:
            raise field_error("tubelet_init", "difference needs two frames in a tubelet: set model.tubelet: 2")
        return self

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """How the logits are divided: (300, 97); () where each clip has one label."""
        return tuple((self.class_heads or {}).values())


class AdapterBlock(RecipeBlock):
    """The two-layer MLP between spatial and temporal encoder. It starts as the identity where it is residual."""

    hidden: Fixed[Annotated[float, Field(gt=0.0, le=8.0)]] = 0.5
    """Width of its hidden layer as a multiple of the model's width."""

    residual: Fixed[bool] = True
    """Add its output to its input."""

    placement: Fixed[Literal["pooled", "tokens"]] = "pooled"
    """What it works on: the `pooled` vector of each tubelet step, or all `tokens` of the spatial encoder, whose mean is
    added to that vector."""

"""What becomes of clips before they are trained on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sfa_dist.recipe.blocks.base import Fixed, Fraction, Positive, RecipeBlock, field_error

Resize = Literal["official", "antialias"]


class RandAugmentBlock(RecipeBlock):
    """`layers` operations of RandAugment for each clip; the official magnitudes are 15 and 20."""

    layers: Fixed[Positive] = 2
    magnitude: Fixed[Annotated[int, Field(ge=0, le=30)]] = 15


class MixupBlock(RecipeBlock):
    """Each clip is blended with its mirror image in the global batch, or in its micro-batch (`over: device`), and so is
    its loss; the share is drawn from Beta(alpha, alpha), once a batch.

    `global` is the same for any number of ranks; where batch.micro is odd, it decodes clips twice.
    """

    alpha: Fixed[Annotated[float, Field(gt=0.0, le=1.0)]]
    over: Fixed[Literal["global", "device"]] = "global"


class AugmentBlock(RecipeBlock):
    """Training augmentation of the official ViViT recipes. Each parameter is drawn once for all frames of a clip.

    `rand_augment` takes the place of `color` and `gray`, which are probabilities. `mixup` blends what comes out.
    `resize` is how frames are resized, for tests too: `official` as the official code does (bilinear without antialias,
    cut to whole levels), `antialias` as torch does, once.
    """

    scale_jitter: Fixed[Annotated[list[float], Field(min_length=2, max_length=2)] | None] = [0.9, 1.33]
    flip: Fixed[Fraction] = 0.5
    resize: Fixed[Resize] = "official"
    color: Fixed[Fraction] = 0.8
    gray: Fixed[Fraction] = 0.1
    rand_augment: RandAugmentBlock | None = None
    mixup: MixupBlock | None = None

    @model_validator(mode="after")
    def _one_kind_of_color(self) -> AugmentBlock:
        if self.rand_augment is not None and (self.color or self.gray):
            raise field_error("rand_augment", "replaces color and gray: set both to 0")
        return self

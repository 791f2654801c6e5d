"""What becomes of clips before they are trained on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sfa_dist.recipe.blocks.base import Fixed, Fraction, Positive, RecipeBlock, field_error

Resize = Literal["official", "antialias"]


class RandAugmentBlock(RecipeBlock):
    """RandAugment: random operations on every clip, the same for all its frames."""

    layers: Fixed[Positive] = 2
    """Operations for each clip."""

    magnitude: Fixed[Annotated[int, Field(ge=0, le=30)]] = 15
    """Strength of an operation, 0 to 30; the official recipes have 15 and 20."""


class MixupBlock(RecipeBlock):
    """Mixup: two clips are blended, and so are their losses, by a share drawn from Beta(alpha, alpha) once a batch."""

    alpha: Fixed[Annotated[float, Field(gt=0.0, le=1.0)]]
    """Parameter of the Beta distribution, above 0 and at most 1."""

    over: Fixed[Literal["global", "device"]] = "global"
    """Where a clip's partner comes from: the mirrored position in the `global` batch, which is the same on any number
    of ranks (with an odd `batch.micro`, some clips are decoded twice), or in the micro-batch of one `device`."""


class AugmentBlock(RecipeBlock):
    """Training augmentation of the official ViViT recipes. Each parameter is drawn once for all frames of a clip."""

    scale_jitter: Fixed[Annotated[list[float], Field(min_length=2, max_length=2)] | None] = [0.9, 1.33]
    """Range of the two random factors that scale height and width, [lowest, highest]; null scales neither."""

    flip: Fixed[Fraction] = 0.5
    """Probability of a horizontal flip."""

    resize: Fixed[Resize] = "official"
    """How frames are resized, in tests too: `official` as the official code does (bilinear, no antialiasing, truncated
    to whole levels), or `antialias`, once, by torch."""

    color: Fixed[Fraction] = 0.8
    """Probability of random brightness, saturation, contrast and hue."""

    gray: Fixed[Fraction] = 0.1
    """Probability that a clip becomes grey."""

    rand_augment: RandAugmentBlock | None = None
    """RandAugment in place of `color` and `gray`, which then have to be 0; null for none."""

    mixup: MixupBlock | None = None
    """Mixup of the augmented clips; null for none."""

    @model_validator(mode="after")
    def _one_kind_of_color(self) -> AugmentBlock:
        if self.rand_augment is not None and (self.color or self.gray):
            raise field_error("rand_augment", "replaces color and gray: set both to 0")
        return self

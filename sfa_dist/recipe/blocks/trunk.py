"""How stage 2's frozen trunk runs, and what is stored of its output."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import PlainValidator, model_validator

from sfa_dist.recipe.blocks.base import Fixed, Fraction, Free, PathText, Positive, RecipeBlock, field_error


def _frames_or_auto(value: object) -> int | str:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31):
        return value
    raise ValueError(f"expected a number of frames greater than 0, or auto, got {value!r}")


FramesOrAuto = Annotated[int | Literal["auto"], PlainValidator(_frames_or_auto)]


class CacheBlock(RecipeBlock):
    """The feature cache: the frozen trunk's output for augmented views of each video (docs/cache.md)."""

    views: Fixed[Positive] = 4
    """Augmented views of each video that are stored."""

    phases: Fixed[Positive] = 1
    """Temporal phases that are stored, at most tubelet x stride; with all of them every temporal crop is exact."""

    dir: Free[PathText | None] = None
    """Folder of the cache; null is the run directory's own `cache/`."""

    live_fraction: Fixed[Fraction] = 0.0
    """Fraction of each epoch's clips that run through the trunk as without a cache."""

    refresh: Fixed[Fraction] = 0.0
    """Further fraction of clips that do so from the epoch on in which stored views repeat."""

    mixup: Fixed[Fraction] = 0.0
    """Alpha of mixup on features; 0 for none."""

    @property
    def runs_trunk(self) -> bool:
        """Whether some clips run through the trunk all the same."""
        return self.live_fraction + self.refresh > 0

    def live_share(self, epoch: int) -> float:
        """Share of an epoch's clips that do."""
        return self.live_fraction + (self.refresh if epoch >= self.views else 0.0)

    @model_validator(mode="after")
    def _live_shares(self) -> CacheBlock:
        if self.live_fraction + self.refresh > 1:
            raise field_error("refresh", "live_fraction and refresh share the same clips: their sum is at most 1")
        if self.mixup and self.runs_trunk:
            raise field_error("mixup", "mixes stored features: set mixup to 0, or live_fraction and refresh")
        return self

"""What is of the whole run: its test, its log, and what stops it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sfa_dist.recipe.blocks.base import Fixed, Free, NonNegative, Positive, RecipeBlock, field_error


class TestBlock(RecipeBlock):
    """The final test. Scores are averaged over temporal x spatial views.

    `also_views` is a list of further [temporal, spatial] that are tested before, such as [[1, 1]] for a single view.
    `average` is what is averaged over the views: logits (the official code) or their softmax. `predictions` is the kind
    of file in which the scores of each clip are kept. `shuffled_frames` adds a control run in which the frames of each
    clip are in random order: how much of the score does not need time.
    """

    temporal_views: Fixed[Positive] = 1
    spatial_views: Fixed[Literal[1, 3]] = 1
    also_views: Fixed[list[Annotated[list[int], Field(min_length=2, max_length=2)]]] = []
    average: Fixed[Literal["logits", "softmax"]] = "logits"
    predictions: Fixed[Literal["npz", "parquet"] | None] = "npz"
    shuffled_frames: Fixed[bool] = False

    @model_validator(mode="after")
    def _views_are_views(self) -> TestBlock:
        for temporal, spatial in self.also_views:
            if temporal < 1 or spatial not in (1, 3):
                raise field_error(
                    "also_views", f"[{temporal}, {spatial}] is not [temporal, spatial] with 1 or 3 spatial views"
                )
        return self

    @property
    def view_grids(self) -> list[tuple[int, int]]:
        """All (temporal, spatial) views that are tested, each once; the last is the result."""
        result = (self.temporal_views, self.spatial_views)
        also = dict.fromkeys((temporal, spatial) for temporal, spatial in self.also_views)
        return [grid for grid in also if grid != result] + [result]


class LogBlock(RecipeBlock):
    """`every` is in optimizer steps. `wandb: auto` is online with a key and offline without."""

    every: Free[Positive] = 10
    wandb: Free[Literal["auto", "online", "offline", "off"]] = "auto"
    wandb_project: Free[str] = "sfa_dist"


class StopBlock(RecipeBlock):
    """What a stop request is, beside Ctrl-C: the run saves its state and leaves with 75.

    SIGUSR1 and SIGUSR2 are for schedulers; take one out that a library uses. `same_failures` attempts in a row that end
    at the same step with the same error, without a step made, are the last: the next one is refused (0: never).
    """

    signals: Free[list[Literal["SIGTERM", "SIGUSR1", "SIGUSR2"]]] = ["SIGTERM", "SIGUSR1"]
    same_failures: Free[NonNegative] = 3

"""What is of the whole run: its test, its log, and what stops it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from sfa_dist.recipe.blocks.base import Fixed, Free, NonNegative, PathText, Positive, RecipeBlock, field_error


class TestBlock(RecipeBlock):
    """The final test. Scores are averaged over temporal x spatial views (docs/evaluation.md)."""

    temporal_views: Fixed[Positive] = 1
    """Clips of each video: 1 is its centre, more are spread evenly from its start to its end."""

    spatial_views: Fixed[Literal[1, 3]] = 1
    """Crops of each clip: 1 (the centre), or 3 along the longer side."""

    also_views: Fixed[list[Annotated[list[int], Field(min_length=2, max_length=2)]]] = []
    """Further [temporal, spatial] views to test before, such as [[1, 1]] for a single view."""

    average: Fixed[Literal["logits", "softmax"]] = "logits"
    """What is averaged over the views: `logits`, as in the official code, or their `softmax`."""

    predictions: Fixed[Literal["npz", "parquet"] | None] = "npz"
    """Format of the file that keeps the scores of each clip; null keeps none."""

    shuffled_frames: Fixed[bool] = False
    """Test once more with the frames of each clip in random order: how much of the score does not need time."""

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
    """What a run logs, and where to."""

    every: Free[Positive] = 10
    """Optimizer steps between two `train` lines of log.jsonl."""

    wandb: Free[Literal["auto", "online", "offline", "off"]] = "auto"
    """Mode of Weights & Biases; `auto` is online with a key and offline without."""

    wandb_project: Free[str] = "sfa_dist"
    """Project in Weights & Biases."""

    trackers: Free[list[Literal["csv", "tensorboard", "mlflow"]]] = []
    """Other trackers to write to (docs/tracking.md)."""

    mlflow_uri: Free[PathText | None] = None
    """MLflow's tracking server; null is the one in `MLFLOW_TRACKING_URI`, or else files in the run directory."""

    mlflow_experiment: Free[str] = "sfa_dist"
    """Experiment in MLflow."""

    baseline: Free[PathText | None] = None
    """Run directory of the end-to-end training that `cost_ratio` compares with (docs/evaluation.md)."""

    calibrate_steps: Free[NonNegative] = 0
    """End-to-end steps of stage 2's frames to time after stage 2, for `cost_ratio` without a baseline; 0 times none."""

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("names a tracker twice")
        return value


class StopBlock(RecipeBlock):
    """What stops a run, beside Ctrl-C. A run that is asked to stop saves its state and exits with 75."""

    signals: Free[list[Literal["SIGTERM", "SIGUSR1", "SIGUSR2"]]] = ["SIGTERM", "SIGUSR1"]
    """Signals that ask a run to stop; schedulers send SIGUSR1 or SIGUSR2. Leave out one that a library uses."""

    same_failures: Free[NonNegative] = 3
    """Starts in a row that end at the same step with the same error, after which the next is refused; 0 never
    refuses."""

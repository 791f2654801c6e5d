"""What all stages of a run share: recipe, run directory, runtime, tracker, stop flag and watch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sfa_dist.boundary.file_names import WEIGHTS
from sfa_dist.boundary.secret import shown_source
from sfa_dist.checkpoint.failpoints import NO_FAILPOINTS, Failpoints
from sfa_dist.errors import PreemptedError
from sfa_dist.models.weights_file import checked_sha256
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.parallel.stop_flag import StopFlag
from sfa_dist.parallel.watch.guard import Watch
from sfa_dist.recipe.schema import Recipe, Stage1, Stage2, StageBlock
from sfa_dist.recipe.shipped import weights_path
from sfa_dist.run.tracking import Tracker

IMAGE_STAGE = "stage:image"
LOGS = "logs"  # Folder in the run directory for the files of single ranks: stacks, loader output.


@dataclass(frozen=True)
class Run:
    """One run, as all of its stages see it."""

    recipe: Recipe
    directory: Path
    runtime: Runtime
    tracker: Tracker
    stop: StopFlag
    dry_run: bool
    resume_from: tuple[str, Path] | None = None  # A stage and the checkpoint that it must resume from.
    watch: Watch = field(default_factory=Watch)
    failpoints: Failpoints = NO_FAILPOINTS
    reported: set[str] = field(default_factory=set)  # Packs' decoders, other than this run's, that have been reported.

    def weights(self, stage: str) -> Path:
        """The path of a stage's final weights, or of those that the recipe gives instead of training the stage."""
        return weights_of(self.recipe, self.directory, stage)

    def cache_directory(self, stage: Stage2) -> Path:
        """The folder of stage 2's feature cache."""
        given = stage.cache.dir if stage.cache else None
        return Path(given) if given else self.directory / "cache"

    def source(self, stage: StageBlock) -> str | None:
        """The weights that a stage starts from (`source_of`)."""
        return source_of(self.recipe, self.directory, stage)

    def source_sha256(self, stage: StageBlock) -> str:
        """Identity of the weights that a stage starts from (`identity_of`). Collective."""
        return self.runtime.on_main(lambda: identity_of(self.source(stage)))


def weights_of(recipe: Recipe, directory: Path, stage: str) -> Path:
    """The path of a stage's final weights in a run directory, or of those that the recipe gives instead."""
    given = recipe.stage1.weights if stage == "stage1" and recipe.stage1 else None
    return Path(given) if given else directory / stage / WEIGHTS


def source_of(recipe: Recipe, directory: Path, stage: StageBlock) -> str | None:
    """The weights that a stage starts from: a file, a `timm:` or `sfa:` name, or None for random weights."""
    if isinstance(stage, Stage2):
        return str(weights_of(recipe, directory, "stage1"))
    if isinstance(stage, Stage1) and stage.image_checkpoint:
        image = str(weights_of(recipe, directory, "image"))
        return image if stage.image_checkpoint == IMAGE_STAGE else stage.image_checkpoint
    return None


def identity_of(source: str | None) -> str:
    """What stands for the weights that a stage starts from: the file's sha256, or the name if it is not a file.

    Raises CheckpointError for a file that differs from its record.
    """
    file = weights_path(source or "")
    return checked_sha256(file) if file.is_file() else shown_source(source or "")


def leave_if_asked(run: Run, when: str) -> None:
    """Raises PreemptedError on every rank if one was asked to stop, at a point with nothing to save. Collective.

    `when` says where the run stops, such as `before stage2`.
    """
    [asked] = run.runtime.sum(bool(run.stop))
    if asked:
        run.tracker.event("preempted", reason=run.stop.reason)
        text = f"stopped {when}: what was done before is saved, run the same command again to go on"
        raise run.runtime.for_all(PreemptedError(text))
